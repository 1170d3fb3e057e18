"""Folders as people have them: files nobody reads, splits, empty classes, names in two forms."""

import io
import json
import sys
import tarfile
import types
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images
from PIL import Image

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.datasets import concatenate
from dlc_jax.datasets.files import left_out_text
from dlc_jax.datasets.instructions import instructions
from dlc_jax.datasets.labels import encode_labels
from dlc_jax.files import image_files
from dlc_jax.preprocess.decode import decode
from dlc_jax.preprocess.inspection import inspect
from dlc_jax.tasks.images import ImageTask, dataset_facts
from dlc_jax.training.images import FinetuneConfig, Finetuner, class_ids_by_name
from dlc_jax.types import Conventions

IMAGE = random_images(1, 40)[0]
PNG = encoded(IMAGE)
COMPOSED, APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def folder(root: Path, *names: str, content: bytes = PNG) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return f"folder:{root}"


def told(source: str, **settings) -> list[str]:
    lines: list[str] = []
    config = Config.of({"stages": ("report",), "dataset": {"deep_images": "error", **settings}})
    ImageTask(config, lines.append).load(source)
    return lines


def test_what_pillow_reads_is_read_whatever_its_suffix(tmp_path):
    kinds = {
        ".jfif": "JPEG", ".JPE": "JPEG", ".mpo": "MPO", ".jp2": "JPEG2000", ".J2K": "JPEG2000",
        ".jpx": "JPEG2000", ".avif": "AVIF", ".Avif": "AVIF", ".apng": "PNG", ".pbm": "PPM",
        ".pnm": "PPM", ".webp": "WEBP", ".TIFF": "TIFF",
    }  # fmt: skip
    for suffix, kind in kinds.items():
        content = encoded(IMAGE[:, :, 0] if suffix == ".pbm" else IMAGE, kind)
        source = folder(tmp_path, f"a/x{suffix}", content=content)
    dataset = dlc.load_dataset(source)
    assert sorted(dataset.ids) == sorted(f"a/x{suffix}" for suffix in kinds)
    assert dataset.left_out == {}
    for sample in dataset:
        assert np.asarray(decode(sample.image, sample.id)).shape == (40, 40, 3)


def test_files_nobody_reads_are_counted_and_told(tmp_path):
    source = folder(
        tmp_path, "a/1.png", "a/deep/2.png", "b/3.png",
        "a/1.HEIC", "a/deep/2.heic", "b/3.heic", "a/notes.TXT", "b/README", "b/.kept.png",
        "labels.csv", "loose.png",
    )  # fmt: skip
    dataset = dlc.load_dataset(source)
    assert dataset.ids.tolist() == ["a/1.png", "a/deep/2.png", "b/3.png"]
    counts = {".heic": 3, ".txt": 1, "without suffix": 1, "hidden": 1, ".csv": 1, ".png": 1}
    assert dataset.left_out == counts
    text = (
        "3 .heic, 1 .csv, 1 .png, 1 .txt, 1 hidden, 1 without suffix "
        "(HEIC and HEIF are read where pillow-heif is installed)"
    )
    assert told(source) == [f"{source}: left out: {text}"]
    assert dataset_facts(dataset)["left_out"] == counts
    assert json.dumps(dataset_facts(dataset))
    assert dataset.subset(np.arange(2)).left_out == counts
    found = inspect(dataset, dataset, minimum=1)
    rows = {name: (number, first) for name, number, first in found.rows()}
    assert rows["files left out"] == rows["files left out, test set"] == (8, text)
    assert not found.is_clean
    both = concatenate([dataset, dataset], ["x", "y"], "both")
    assert both.left_out == {suffix: 2 * count for suffix, count in counts.items()}


def test_joined_classes_begin_with_numbers_and_superscripts_are_none(tmp_path):
    folder(tmp_path / "a", "10/1.png", "9/2.png")
    folder(tmp_path / "b", "x²/3.png", "²/4.png")
    dataset = dlc.load_dataset(f"folder:{tmp_path}/a+b")
    assert dataset.class_names == ("9", "10", "x²", "²")


def test_what_other_programs_leave_is_no_sample_no_class_and_not_counted(tmp_path):
    source = folder(
        tmp_path, "a/1.png", "b/2.png",
        "@eaDir/a/1.png", "a/@eaDir/1.png", "a/.thumbnails/1.png", ".thumbnails/1.png",
        "__MACOSX/a/._1.png", "a/._1.png", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini",
        ".ipynb_checkpoints/1.png", "b/.ipynb_checkpoints/2-checkpoint.png", "#recycle/1.png",
        "$RECYCLE.BIN/1.png", "lost+found/1.png", ".DS_Store", "System Volume Information/1.png",
    )  # fmt: skip
    dataset = dlc.load_dataset(source)
    assert dataset.ids.tolist() == ["a/1.png", "b/2.png"]
    assert dataset.class_names == ("a", "b")
    assert dataset.left_out == {}
    assert dataset.empty_classes == ()


def shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def test_members_nobody_reads_are_counted(tmp_path):
    members = {
        "a/1.jfif": encoded(IMAGE, "JPEG"),
        "a/1.cls": b"0",
        "a/1.txt": b"",
        "a/1.json": b"{}",
    }
    members |= {"a/2.avif": encoded(IMAGE, "AVIF"), "a/2.cls": b"1", "a/2.txt": b"", "a/2.npy": b""}
    members |= {"__MACOSX/a/1.jfif": b"", "a/@eaDir/2.avif": b"", "a/._2.avif": b""}
    source = shard(tmp_path / "x.tar", members)
    dataset = dlc.load_dataset(source)
    assert dataset.ids.tolist() == ["a/1", "a/2"]
    assert dataset.left_out == {".txt": 2, ".npy": 1}
    assert told(source) == [f"{source}: left out: 2 .txt, 1 .npy"]
    pq.write_table(pa.table({"image": [PNG], "label": [0]}), tmp_path / "x.parquet")
    (tmp_path / "._x.parquet").write_bytes(b"of another file system")
    assert len(dlc.load_dataset(f"parquet:{tmp_path}")) == 1


@pytest.fixture
def heif(monkeypatch):
    """A `pillow_heif` that calls PNG in a HEIF box HEIF, and counts its registrations."""

    class Heif:
        registered = 0

    def register() -> None:
        Heif.registered += 1

        def opened(stream, filename):
            image = Image.open(io.BytesIO(stream.read()[24:]), formats=("PNG",))
            image.format = "HEIF"
            return image

        Image.register_open("HEIF", opened, lambda prefix: prefix[4:12] == b"ftypheic")

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    image_files.reads_heif.cache_clear()
    yield Heif
    image_files.reads_heif.cache_clear()
    if "HEIF" in Image.OPEN:
        del Image.OPEN["HEIF"]
        Image.ID.remove("HEIF")


HEIC = (24).to_bytes(4, "big") + b"ftypheic" + bytes(4) + b"mif1heic" + PNG


def test_heic_is_read_where_pillow_heif_is(tmp_path, heif):
    source = folder(tmp_path, "a/1.HEIC", "a/2.heif", content=HEIC)
    folder(tmp_path, "b/3.png")
    assert heif.registered == 0
    dataset = dlc.load_dataset(source)
    assert dataset.ids.tolist() == ["a/1.HEIC", "a/2.heif", "b/3.png"]
    assert dataset.left_out == {}
    np.testing.assert_array_equal(np.asarray(decode(dataset[0].image, "x")), IMAGE)
    assert heif.registered == 1


def test_heic_is_named_where_pillow_heif_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_files.reads_heif.cache_clear()
    source = folder(tmp_path, "a/1.HEIC", content=HEIC)
    folder(tmp_path, "b/3.png")
    with pytest.raises(dlc.InputError, match="class 'a' has no image that can be read, but 1 HEIC"):
        dlc.load_dataset(source)
    with pytest.raises(dlc.InputError, match="a HEIF image; .*pillow-heif"):
        decode(HEIC, "x")
    image_files.reads_heif.cache_clear()


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        (("Test", "Train"), "give one, folder:{}/Train"),
        (("TRAIN", "VALIDATION", "Testing"), "folder:{}/TRAIN, or .*folder:{}/TRAIN+VALIDATION"),
        (("train", "val", "test"), "folder:{}/train, or .*folder:{}/train+val"),
        (("valid", "training", "test", "@eaDir"), "folder:{}/training, or .*/training+valid"),
        (("Train",), "give one, folder:{}/Train"),
        (("test", "testing"), "one of them that is for training"),
        (("train", "Evaluation"), "give one, folder:{}/train"),
        (("training_set", "test_set"), "give one, folder:{}/training_set"),
        (("val2017", "train2017"), "folder:{}/train2017, or .*folder:{}/train2017+val2017"),
        (("images_Test", "images_train"), "give one, folder:{}/images_train"),
    ],
)
def test_splits_are_known_in_any_case_and_the_hint_leaves_the_test_set_out(tmp_path, parts, hint):
    for part in parts:
        folder(tmp_path, f"{part}/a/1.png", f"{part}/b/2.png")
    (tmp_path / "annotations").mkdir()  # without images: no class that would hide the splits
    expected = hint.replace("{}", str(tmp_path)).replace("+", r"\+")
    with pytest.raises(dlc.InputError, match=f"sub-folders are splits.*{expected}") as caught:
        dlc.load_dataset(f"folder:{tmp_path}")
    given = str(caught.value).partition("not classes; ")[2]
    assert "test" not in given.lower().replace(str(tmp_path).lower(), "")


def test_a_class_named_train_is_a_class(tmp_path):
    source = folder(tmp_path, "train/1.png", "bus/2.png")
    assert dlc.load_dataset(source).class_names == ("bus", "train")
    alone = folder(tmp_path / "alone", "train/1.png")
    assert dlc.load_dataset(alone).class_names == ("train",)
    things = folder(tmp_path / "things", "train_station/1.png", "test-tube/2.png")
    assert dlc.load_dataset(things).class_names == ("test-tube", "train_station")


def test_suffixes_of_files_left_out_are_shown_on_one_line(tmp_path):
    source = folder(tmp_path, "a/1.png", "a/x.b\nforged\x1b[2j")
    text = left_out_text(dlc.load_dataset(source).left_out)
    assert text == r"1 .b\nforged\x1b[2j"


def test_tables_of_training_and_test_side_by_side_are_not_joined(tmp_path):
    table = pa.table({"image": [PNG, PNG], "label": [0, 1]})
    for name in ("Train-00000-of-00001", "validation-00000", "test-00000-of-00001"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(dlc.InputError, match=r"of test \(test\); give .*/Train\*\.parquet"):
        dlc.load_dataset(f"parquet:{tmp_path}")
    assert len(dlc.load_dataset(f"parquet:{tmp_path}/[Tv]*.parquet")) == 4
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    pq.write_table(table, tmp_path / "testimony.parquet")
    assert len(dlc.load_dataset(f"parquet:{tmp_path}")) == 6


def declared(path: Path, labels: list[int], names: list[str]) -> str:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": [PNG] * len(labels), "label": labels})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return f"parquet:{path}"


def test_declared_classes_without_samples_are_left_out_and_recorded(tmp_path):
    source = declared(tmp_path / "x.parquet", [4, 1, 4, 1], ["ant", "bee", "cat", "dog", "eel"])
    dataset = dlc.load_dataset(source)
    assert dataset.class_names == ("bee", "eel")
    assert dataset.labels.tolist() == [1, 0, 1, 0]
    assert dataset.label_table == {1: 0, 4: 1}
    assert dataset.empty_classes == ("ant", "cat", "dog")
    line = f"{source}: note: classes without samples, left out: 'ant', 'cat', 'dog'"
    assert told(source) == [line]
    facts = dataset_facts(dataset)
    assert (facts["empty_classes"], facts["label_table"]) == (dataset.empty_classes, {1: 0, 4: 1})
    test = dlc.load_dataset(
        declared(tmp_path / "y.parquet", [4, 4, 1], ["ant", "bee", "cat", "dog", "eel"])
    )
    assert class_ids_by_name(test, dataset).tolist() == [1, 1, 0]
    shuffled = dlc.load_dataset(declared(tmp_path / "z.parquet", [0, 2], ["eel", "ant", "bee"]))
    assert class_ids_by_name(shuffled, dataset).tolist() == [1, 0]
    whole = dlc.array_dataset([PNG], [1], ["x"], ["ant", "eel"])  # declares more than it has
    assert class_ids_by_name(whole, dataset).tolist() == [1]
    unknown = dlc.load_dataset(declared(tmp_path / "u.parquet", [0], ["ant"]))
    with pytest.raises(dlc.InputError, match="classes that .* has not: 'ant'"):
        class_ids_by_name(unknown, dataset)


def test_empty_folders_are_no_classes(tmp_path):
    source = folder(tmp_path, "b/1.png", "d/2.png", "c/notes.txt")
    (tmp_path / "a" / "deep").mkdir(parents=True)
    dataset = dlc.load_dataset(source)
    assert dataset.class_names == ("b", "d")
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.empty_classes == ("a", "c")
    assert dataset.left_out == {".txt": 1}
    found = inspect(dataset, minimum=1)
    assert found.empty_classes == ["a", "c"]
    assert ("classes without samples", 2, "a") in found.rows()
    with pytest.raises(dlc.InputError, match=r"no image in its sub-folders c \(looked for \.jpg"):
        dlc.load_dataset(folder(tmp_path / "c" / "other", "c/x.txt"))
    # a class that one of two parts has
    folder(tmp_path / "parts", "train/a/1.png", "train/b/1.png", "val/a/2.png", "val/c/2.png")
    for name in ("train/c", "val/b", "val/z"):
        (tmp_path / "parts" / name).mkdir()
    joined = dlc.load_dataset(f"folder:{tmp_path}/parts/train+val")
    assert joined.class_names == ("a", "b", "c")
    assert joined.empty_classes == ("z",)


def test_a_part_of_a_split_without_a_class_can_be_pruned(tmp_path):
    names = [f"a/{i}.png" for i in range(10)]
    source = folder(tmp_path, *names, "b/1.png", "c/1.png", "c/2.png")
    parts = [dlc.load_dataset(f"split:50/50@3:{part}:{source}") for part in ("train", "validation")]
    assert {name for part in parts for name in part.class_names} == {"a", "b", "c"}
    for part in parts:
        assert sorted({*part.class_names, *part.empty_classes}) == ["a", "b", "c"]
        assert np.bincount(part.labels, minlength=part.num_classes).min() > 0
    lacking = next(part for part in parts if "b" not in part.class_names)
    assert lacking.label_table == {0: 0, 2: 1}


def test_the_check_names_every_unreadable_file_and_counts_the_test_set_apart(tmp_path, capsys):
    from dlc_jax.cli.check import _print

    folder(tmp_path / "train", *(f"a/bad{i}.png" for i in range(25)), content=b"no image")
    train = folder(tmp_path / "train", "a/1.png", "b/2.png")
    folder(tmp_path / "test", "a/bad.png", content=b"none")
    test = folder(tmp_path / "test", "a/0.png")
    (tmp_path / "train" / "empty").mkdir()
    found = inspect(dlc.load_dataset(train), dlc.load_dataset(test), minimum=1)
    rows = {name: number for name, number, _ in found.rows()}
    assert rows["samples"] == 27
    assert rows["samples of the test set"] == 2
    assert rows["unreadable"] == 25
    assert rows["unreadable, test set"] == 1
    assert rows["classes without samples"] == 1
    assert rows["in training and test (groups)"] == 1
    _print(found)
    shown = capsys.readouterr().out
    for i in range(25):
        assert f"\n  a/bad{i}.png sample" in shown
    assert "\n  test:a/bad.png sample" in shown


def test_class_names_are_the_same_in_either_form_of_unicode(tmp_path):
    assert COMPOSED != APART
    train = dlc.load_dataset(folder(tmp_path / "train", f"{COMPOSED}/1.png", "thé/2.png"))
    source = folder(tmp_path / "test", f"{APART}/1.png", "thé/2.png")
    test = dlc.load_dataset(source)
    assert test.class_names == train.class_names
    assert test[0].image == PNG  # under the name that the folder has
    assert class_ids_by_name(test, train).tolist() == [0, 1]
    both = dlc.load_dataset(
        folder(tmp_path / "both", f"{COMPOSED}/1.png", f"{APART}/2.png", "b/3.png")
    )
    assert both.class_names == ("b", COMPOSED)
    assert both.labels.tolist() == [0, 1, 1]
    rows = f"path,label\ntrain/{COMPOSED}/1.png,{COMPOSED}\ntest/{APART}/1.png,{APART}\n"
    (tmp_path / "x.csv").write_text(rows + "both/b/3.png,b\n", encoding="utf-8")
    assert dlc.load_dataset(f"csv:{tmp_path}/x.csv").class_names == ("b", COMPOSED)
    joined = dlc.load_dataset(f"folder:{tmp_path}/train+test")
    assert joined.num_classes == 2
    own = dlc.Dataset([PNG], np.array([0]), np.array(["x"]), (APART,))
    assert class_ids_by_name(own, train).tolist() == [0]
    with pytest.raises(dlc.InputError, match="class names must be all different"):
        encode_labels([0, 1], [COMPOSED, APART], "x")


def test_names_that_look_the_same_are_shown_apart(tmp_path):
    train = dlc.load_dataset(folder(tmp_path / "train", "ант/1.png", "b/2.png"))
    test = dlc.load_dataset(folder(tmp_path / "test", "aнт/1.png", "b/2.png"))
    with pytest.raises(dlc.InputError) as caught:
        class_ids_by_name(test, train)
    assert r"('a\u043d\u0442')" in str(caught.value)
    assert r"('\u0430\u043d\u0442')" in str(caught.value)


def test_categories_and_untested_classes_go_by_name_in_either_form(sample_encoder):
    rows = [{"prompt": "a", "response": "b", "topic": name} for name in (COMPOSED, APART, "thé")]
    labels, names = instructions(rows).categories("topic")
    assert names == (COMPOSED, "thé")
    assert labels.tolist() == [0, 0, 1]
    train = dlc.array_dataset([PNG] * 2, [0, 1], ["a", "b"], ["thé", COMPOSED])
    test = dlc.Dataset([PNG], np.array([0]), np.array(["c"]), (APART,), "its test")
    images, conventions = dlc.Images(train, size=32), Conventions.of("default")
    tuner = Finetuner(sample_encoder, images, test, FinetuneConfig(), conventions)
    assert tuner.notes == ["test set its test", "note: no test image of thé"]
