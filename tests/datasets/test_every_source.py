"""The same images through every source, and what broken inputs end in."""

import csv
import functools
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import require_shared

import dlc_jax as dlc
from dlc_jax.datasets import concatenate
from dlc_jax.preprocess.decode import decode
from dlc_jax.preprocess.images import load_images

NAMES = ("bonsai", "butterfly", "chandelier")


@pytest.fixture(scope="module")
def some(sample) -> dlc.Dataset:
    """Four images of three classes, in the order of their ids."""
    where = np.concatenate([np.flatnonzero(sample.labels == j)[:4] for j in range(3)])
    where = where[np.argsort(sample.ids[where])]
    images = [sample[int(i)].image for i in where]
    return dlc.array_dataset(
        images, sample.labels[where], sample.ids[where].tolist(), NAMES, name="some"
    )


def in_parquet(some: dlc.Dataset) -> pa.Table:
    structs = [{"bytes": some[i].image, "path": str(some.ids[i])} for i in range(len(some))]
    return pa.table({"image": structs, "label": [some.class_names[label] for label in some.labels]})


def as_folder(some: dlc.Dataset, root: Path) -> str:
    for i in range(len(some)):
        path = root / str(some.ids[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(some[i].image)
    return f"folder:{root}"


def as_csv(some: dlc.Dataset, root: Path) -> str:
    as_folder(some, root / "images")
    with open(root / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("split", "path", "label"))
        for i in range(len(some)):
            table.writerow(("all", f"images/{some.ids[i]}", some.class_names[some.labels[i]]))
    return f"csv:{root}/table.csv"


def as_parquet(some: dlc.Dataset, root: Path) -> str:
    pq.write_table(in_parquet(some), root / "rows.parquet")
    return f"parquet:{root}/rows.parquet"


def squares(some: dlc.Dataset) -> np.ndarray:
    """The middles of the images, which all have the same shorter side."""
    images = [decode(some[i].image, "x") for i in range(len(some))]
    side = min(images[0].size)
    boxes = [
        (round((image.width - side) / 2), round((image.height - side) / 2)) for image in images
    ]
    return np.stack(
        [
            np.asarray(image.crop((left, top, left + side, top + side)))
            for image, (left, top) in zip(images, boxes, strict=True)
        ]
    )


def as_npz(some: dlc.Dataset, root: Path) -> str:
    np.savez(
        root / "arrays.npz",
        images=squares(some),
        labels=some.labels,
        ids=some.ids,
        class_names=some.class_names,
    )
    return f"npz:{root}/arrays.npz"


def as_tar(some: dlc.Dataset, root: Path) -> str:
    """Two shards; labels in .cls and in .json."""
    for shard, positions in enumerate(np.array_split(np.arange(len(some)), 2)):
        with tarfile.open(root / f"{shard:03}.tar", "w") as file:
            for i in positions:
                stem = str(some.ids[i]).removesuffix(".jpg")
                name = some.class_names[some.labels[i]]
                label = (".cls", name) if i % 2 else (".json", json.dumps({"label": name}))
                for suffix, content in (
                    (".jpg", some[int(i)].image),
                    (label[0], label[1].encode()),
                ):
                    member = tarfile.TarInfo(stem + suffix)
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    return f"tar:{root}"


def as_hub_copy(some: dlc.Dataset, root: Path) -> str:
    (root / "data").mkdir()
    table = in_parquet(some)
    pq.write_table(table.slice(0, 5), root / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(5), root / "data" / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 3), root / "data" / "test-00000-of-00001.parquet")
    return f"hf:{root}/train"


def as_saved_to_disk(some: dlc.Dataset, root: Path) -> str:
    (root / "train").mkdir()
    table = in_parquet(some)
    with pa.ipc.new_stream(str(root / "train" / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (root / "train" / "state.json").write_text(json.dumps(state))
    return f"hf:{root}/train"


def as_aircraft(some: dlc.Dataset, root: Path) -> str:
    data = root / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("\n".join(some.class_names) + "\n")
    lines = []
    for i in range(len(some)):
        (data / "images" / f"{i:07}.jpg").write_bytes(some[i].image)
        lines.append(f"{i:07} {some.class_names[some.labels[i]]}\n")
    (data / "images_variant_trainval.txt").write_text("".join(lines))
    return f"fgvc_aircraft:{root}/trainval"


@functools.cache  # TFDS registers a builder by its name, once
def tfds_builder() -> type:
    import tensorflow_datasets as tfds

    class SomeImages(tfds.core.GeneratorBasedBuilder):
        """The images of `content`, in their order."""

        VERSION = tfds.core.Version("1.0.0")
        content: dlc.Dataset

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=list(self.content.class_names)),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(len(self.content)):
                image, label, name = self.content[i]
                yield i, {"image": io.BytesIO(image), "label": label, "file_name": name}

    return SomeImages


def as_tfds(some: dlc.Dataset, root: Path) -> str:
    """Prepared by TFDS itself, which needs no TensorFlow for files of array_record."""
    builder = tfds_builder()
    builder.content = some
    builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    return "tfds:some_images/train"


@pytest.fixture(autouse=True)
def tfds_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))


BUILDERS: dict[str, Callable[[dlc.Dataset, Path], str]] = {
    "folder": as_folder,
    "csv": as_csv,
    "parquet": as_parquet,
    "npz": as_npz,
    "tar": as_tar,
    "hub copy": as_hub_copy,
    "saved to disk": as_saved_to_disk,
    "aircraft": as_aircraft,
    "tfds": as_tfds,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_source_gives_the_same_images_labels_and_order(some, tmp_path, name):
    dataset = dlc.load_dataset(BUILDERS[name](some, tmp_path))
    assert dataset.class_names == NAMES
    np.testing.assert_array_equal(dataset.labels, some.labels)
    if name == "npz":  # pixels, already cropped
        found = np.stack([dataset[i].image for i in range(len(dataset))])
        np.testing.assert_array_equal(found, squares(some))
    else:
        assert [dataset[i].image for i in range(12)] == [some[i].image for i in range(12)]
    if name not in ("tar", "csv", "aircraft"):
        assert dataset.ids.tolist() == some.ids.tolist()
    assert len(set(dataset.ids.tolist())) == 12


@pytest.mark.parametrize("name", ["folder", "csv", "npz", "tar", "aircraft", "parts"])
def test_other_processes_get_it_pickled(some, tmp_path, name):
    """As data loaders with workers hand it on."""
    source = f"folder:{tmp_path}/train+val"
    for part in ("train", "val") if name == "parts" else ():
        as_folder(some, tmp_path / part)
    dataset = dlc.load_dataset(source if name == "parts" else BUILDERS[name](some, tmp_path))
    again = pickle.loads(pickle.dumps(dataset))
    last = len(dataset) - 1
    np.testing.assert_array_equal(again[last].image, dataset[last].image)
    assert again.fingerprint == dataset.fingerprint


def test_a_folder_keeps_its_paths_once(some, tmp_path):
    dataset = dlc.load_dataset(as_folder(some, tmp_path))
    assert np.shares_memory(dataset.images.places, dataset.ids)


@pytest.fixture(scope="module")
def textures() -> dlc.Dataset:
    """Thirty of the 1,200 photographs, in the order of their ids."""
    folder = require_shared("dtd10")
    whole = dlc.load_dataset(f"parquet:{folder}/train+validation+test.parquet")
    where = np.concatenate([np.flatnonzero(whole.labels == label)[::40] for label in range(10)])
    return whole.subset(where[np.argsort(whole.ids[where])])


@pytest.fixture(scope="module")
def texture_losses(textures, sample_encoder) -> np.ndarray:
    assert len(textures) == 30
    assert min(decode(textures[0].image, "x").size) == 256
    return scored(textures, sample_encoder)


def scored(dataset: dlc.Dataset, encoder: dlc.Encoder) -> np.ndarray:
    """Losses [2, n] at 224 px, of which the centres are cut without resizing."""
    return dlc.probe(
        encoder, dataset, image_size=224, num_probes=2, path=dlc.PathSpec(placement="midpoint")
    ).losses


@pytest.mark.parametrize("name", BUILDERS)
def test_scores_do_not_depend_on_the_source(
    textures, texture_losses, sample_encoder, tmp_path, name
):
    dataset = dlc.load_dataset(BUILDERS[name](textures, tmp_path))
    np.testing.assert_array_equal(dataset.labels, textures.labels)
    np.testing.assert_array_equal(scored(dataset, sample_encoder), texture_losses)


def test_ids_survive_partial_reads(some, tmp_path):
    """A shard, a split or a shorter table names its samples as the whole does."""
    whole = dlc.load_dataset(as_tar(some, tmp_path))
    part = dlc.load_dataset(f"tar:{tmp_path}/001.tar")
    np.testing.assert_array_equal(part.ids, whole.ids[6:])
    table = dlc.load_dataset(as_csv(some, tmp_path))
    lines = (tmp_path / "table.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text(lines[0] + "".join(reversed(lines[5:])))
    shorter = dlc.load_dataset(f"csv:{tmp_path}/table.csv")
    assert shorter.ids.tolist() == table.ids[4:][::-1].tolist()


def test_parts_are_joined(some, tmp_path):
    """One after the other; classes by name, although the second part lacks the first class."""
    for part, where in (("train", np.arange(8)), ("val", np.arange(4, 12))):
        as_folder(some.subset(where), tmp_path / part)
    dataset = dlc.load_dataset(f"folder:{tmp_path}/train+val")
    assert dataset.class_names == NAMES
    expected = np.concatenate([np.arange(8), np.arange(4, 12)])
    np.testing.assert_array_equal(dataset.labels, some.labels[expected])
    assert [dataset[i].image for i in range(16)] == [some[int(i)].image for i in expected]
    # an id that both have is told apart by its part
    assert dataset.ids[0] == f"train/{some.ids[0]}"
    assert dataset.ids[8] == f"val/{some.ids[4]}"
    (tmp_path / "a+b").mkdir()
    as_folder(some, tmp_path / "a+b")
    assert dlc.load_dataset(f"folder:{tmp_path}/a+b").ids.tolist() == some.ids.tolist()
    with pytest.raises(ValueError, match="no such folder"):
        dlc.load_dataset(f"folder:{tmp_path}/train+test")


def test_parts_of_the_sample_and_of_tables(some, tmp_path):
    both = dlc.load_dataset("demo:caltech15/train+test")
    assert len(both) == 750 + 300
    assert both[751].image == dlc.load_dataset("demo:caltech15/test")[1].image
    as_csv(some, tmp_path)
    lines = (tmp_path / "table.csv").read_text().splitlines(keepends=True)
    for name, rows in (("one", lines[1:7]), ("two", lines[7:])):
        (tmp_path / f"{name}.csv").write_text(lines[0] + "".join(rows))
    joined = dlc.load_dataset(f"csv:{tmp_path}/one+two.csv")
    whole = dlc.load_dataset(f"csv:{tmp_path}/table.csv")
    assert joined.ids.tolist() == whole.ids.tolist()
    np.testing.assert_array_equal(joined.labels, whole.labels)


def test_parts_with_remapped_integers_keep_one_table():
    parts = [
        dlc.array_dataset([np.zeros((4, 4), np.uint8)] * 2, [7, 10], ids=["a", "b"]),
        dlc.array_dataset([np.zeros((4, 4), np.uint8)] * 2, [2, 7], ids=["c", "d"]),
    ]
    joined = concatenate(parts, ["x", "y"], "joined")
    assert joined.class_names == ("2", "7", "10")
    assert joined.labels.tolist() == [1, 2, 0, 1]
    assert joined.label_table == {2: 0, 7: 1, 10: 2}


def test_integer_labels_in_tables_and_shards_are_class_ids(some, tmp_path):
    as_folder(some, tmp_path)
    rows = "".join(f"{some.ids[i]}\t{some.labels[i]}\n" for i in range(12))
    (tmp_path / "table.tsv").write_text("﻿file_name\tclass\n" + rows)
    dataset = dlc.load_dataset(f"csv:{tmp_path}/table.tsv")
    np.testing.assert_array_equal(dataset.labels, some.labels)
    assert dataset.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("files", "source", "says"),
    [
        ({}, "csv:{}/x.csv", "cannot be read"),
        ({"x.csv": b"path,label\n"}, "csv:{}/x.csv", "expected a header and one or more rows"),
        ({"x.csv": b"name,label\na,b\n"}, "csv:{}/x.csv", "no path column.*found name, label"),
        ({"x.csv": b"path,label\na.jpg\n"}, "csv:{}/x.csv", "row 2 has 1 values, expected 2"),
        ({"x.csv": b"path,label\na.jpg,\n"}, "csv:{}/x.csv", "row 2 has no path or no label"),
        ({"x.csv": b"path,label\n\xff\xfe,1\n"}, "csv:{}/x.csv", "cannot be read"),
        ({"x.npz": b"PK no archive"}, "npz:{}/x.npz", "cannot be read as arrays"),
        ({"x.tar": b"no archive" * 100}, "tar:{}/x.tar", "not a readable, uncompressed tar file"),
        ({"x.tar": b"\x1f\x8b\x08" + b"0" * 600}, "tar:{}", "not a readable, uncompressed tar"),
        ({}, "tar:{}/x.tar", "no such file"),
        ({}, "hf:{}/train", "no Parquet file of split 'train'.*found none"),
        ({}, "hf:train", "expected hf:<owner/name or folder>/<split>"),
        ({}, "hf:/absent/folder/train", "no folder '/absent/folder', and that is no hub id"),
        ({"variants.txt": b"a\n"}, "fgvc_aircraft:{}/train", "images_variant_train.txt cannot be"),
        ({}, "fgvc_aircraft:{}/training", "Did you mean 'train'"),
        (
            {"variants.txt": b"a\n", "images_variant_val.txt": b"x\n"},
            "fgvc_aircraft:{}/val",
            "line 1: expected '<id> <variant>', found 'x'",
        ),
    ],
)
def test_sources_that_do_not_fit_are_told_apart(tmp_path, files, source, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        dlc.load_dataset(source.format(tmp_path))


def shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def test_shards_with_incomplete_samples_are_refused(some, tmp_path):
    image = some[0].image
    for members, says in (
        ({"a.jpg": image}, "sample 'a' has no label; expected .cls"),
        ({"a.cls": b"1"}, "sample 'a' has no image .found .cls"),
        ({"a.jpg": image, "a.json": b"{"}, "sample 'a': label cannot be read"),
        ({"a.jpg": image, "a.json": b"[]"}, "sample 'a' has no label"),
        ({}, "holds no sample"),
    ):
        with pytest.raises(ValueError, match=says):
            dlc.load_dataset(shard(tmp_path / "x.tar", members))


def test_links_and_names_that_lead_out_of_a_shard_are_not_followed(some, tmp_path):
    """Members are read where they lie in the shard; nothing is written, no link is opened."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(some[0].image)
    inside = tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(inside / "x.tar", "w") as file:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        file.addfile(link)
        for name, content in (
            ("a.cls", b"1"),
            ("../../b.jpg", some[1].image),
            ("../../b.cls", b"0"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="sample 'a' has no image"):
        dlc.load_dataset(f"tar:{inside}")
    assert sorted(tmp_path.rglob("*")) == before


def test_pickled_arrays_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(
        tmp_path / "x.npz",
        images=np.array([Trap()], dtype=object),
        labels=np.zeros(1, int),
    )
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        dlc.load_dataset(f"npz:{tmp_path}/x.npz")
    assert not (tmp_path / "sprung").exists()


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """Some bytes changed, cut out or repeated."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 6))):
        start = int(generator.integers(0, len(data)))
        length = int(generator.integers(1, 40))
        kind = generator.integers(0, 4)
        if kind == 0:
            data[start : start + length] = generator.bytes(min(length, len(data) - start))
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = data[start : start + length]
        else:
            del data[start:]
        if not data:
            data = bytearray(b"0")
    return bytes(data)


@pytest.mark.parametrize("name", ["folder", "parquet", "csv", "tar", "npz"])
def test_a_hundred_mutations_end_in_success_or_one_clear_error(some, tmp_path, name):
    clean = tmp_path / "clean"
    clean.mkdir()
    source = BUILDERS[name](some, clean)
    if name == "folder":
        target = clean / str(some.ids[5])
    elif name == "tar":
        target = clean / "001.tar"
    else:
        target = Path(source.partition(":")[2])
    whole = target.read_bytes()
    files = sorted(tmp_path.rglob("*"))
    generator = np.random.default_rng(7)
    refusals = []
    for _ in range(100):
        target.write_bytes(mutated(whole, generator))
        try:
            load_images(dlc.load_dataset(source), 32)
        except dlc.InputError as error:  # any other error fails the test
            refusals.append(str(error))
    assert len(refusals) > 10
    assert min(map(len, refusals)) > 20
    assert sorted(tmp_path.rglob("*")) == files
