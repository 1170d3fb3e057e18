"""Exports are read back by what they are meant for."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images
from PIL import Image

import dlc_jax as dlc
from dlc_jax.exports import EXPORTS

KEPT = np.array([1, 4, 5, 17, 40, 59])


@pytest.fixture(scope="module")
def files(small_sample, tmp_path_factory) -> dlc.Dataset:
    """The same images as files, in two folders that are joined."""
    root = tmp_path_factory.mktemp("files")
    for i in range(60):
        path = root / ("a" if i % 4 else "b") / str(small_sample.ids[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_sample[i].image)
    return dlc.load_dataset(f"folder:{root}/a+b")


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("part", ["kept", "dropped"])
def test_every_form_holds_exactly_its_part(small_sample, files, tmp_path, form, part):
    small_sample = files if form == "image_links" else small_sample
    place = tmp_path / f"out{EXPORTS[form].suffix}"
    path = dlc.export(small_sample, KEPT, place, form=form, part=part)
    expected = KEPT if part == "kept" else np.setdiff1d(np.arange(60), KEPT)
    ids = small_sample.ids[expected].tolist()
    if form == "npy":
        positions = np.load(path, allow_pickle=False)
        assert positions.dtype == np.int64
        np.testing.assert_array_equal(positions, expected)
    elif form == "ids":
        assert path.read_text().splitlines() == ids
    elif form == "jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["id"] for line in lines] == ids
        assert [line["position"] for line in lines] == expected.tolist()
        names = small_sample.class_names
        assert [line["class_name"] for line in lines] == [names[line["label"]] for line in lines]
    elif form == "json":
        manifest = json.loads(path.read_text())
        assert (manifest["part"], manifest["method"], manifest["ids"]) == (part, None, ids)
        classes = [small_sample.class_names[label] for label in small_sample.labels[expected]]
        assert manifest["num_per_class"] == {n: classes.count(n) for n in small_sample.class_names}
    else:
        folders = dict.fromkeys(("image_folder", "image_links"), f"folder:{path}")
        source = {**folders, "hf": f"hf:{path}/train"}
        back = dlc.load_dataset(source.get(form, f"parquet:{path}"))
        content = {back[i].image: back.class_names[back.labels[i]] for i in range(len(back))}
        assert content == {
            small_sample[int(i)].image: small_sample.class_names[small_sample.labels[i]]
            for i in expected
        }
        if form not in folders:
            assert back.ids.tolist() == ids
            # the file declares all classes, and a part need not have samples of each
            assert sorted(back.class_names + back.empty_classes) == sorted(small_sample.class_names)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_selection_is_exported_by_its_ids(small_sample, tmp_path):
    kept = dlc.select(
        np.arange(60.0),
        small_sample.labels,
        method="hardest",
        keep_fraction=0.5,
        ids=small_sample.ids,
    )
    backwards = small_sample.subset(np.arange(60)[::-1])
    manifest = json.loads(
        dlc.export(backwards, kept, tmp_path / "x.json", form="json", part="dropped").read_text()
    )
    settings = {"method": "hardest", "keep_fraction": 0.5, "split": None, "seed": 0}
    assert {name: manifest[name] for name in settings} == settings
    assert sorted(manifest["ids"]) == sorted(set(small_sample.ids) - set(kept.ids))
    dlc.export(backwards, kept, tmp_path / "x.txt", form="ids")
    assert sorted((tmp_path / "x.txt").read_text().split("\n")[:-1]) == sorted(kept.ids.tolist())


def test_arrays_become_png_without_loss(tmp_path):
    pixels = random_images(4, 20)
    grey = [image[:, :, :1] for image in pixels[:2]]
    dataset = dlc.array_dataset(
        [*grey, *pixels[2:]], ["a", "b", "a", "b"], ids=["0", "1", "2", "3"]
    )
    root = dlc.export(dataset, [0, 3], tmp_path / "x", form="image_folder")
    found = np.asarray(Image.open(root / "b" / "3.png"))
    np.testing.assert_array_equal(found, pixels[3])
    np.testing.assert_array_equal(np.asarray(Image.open(root / "a" / "0.png")), grey[0][:, :, 0])


def test_links_lead_to_the_files_and_need_some(small_sample, files, tmp_path):
    root = dlc.export(files, KEPT, tmp_path / "x", form="image_links")
    links = [path for path in root.rglob("*") if not path.is_dir()]
    assert len(links) == len(KEPT)
    assert all(path.is_symlink() for path in links)
    found = {path.resolve().read_bytes() for path in links}
    assert found == {files[int(i)].image for i in KEPT}
    with pytest.raises(ValueError, match="is no file of its own to link to"):
        dlc.export(small_sample, KEPT, tmp_path / "y", form="image_links")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_names_that_lead_elsewhere_stay_in_the_folder(tmp_path):
    pixels = random_images(3, 8)
    ids = ["../../up.png", "/etc/absolute", "x" * 400 + ".png"]
    dataset = dlc.array_dataset(pixels, ["..", "a/b", "con:"], ids=ids)
    root = dlc.export(dataset, [0, 1, 2], tmp_path / "in" / "x", form="image_folder")
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert files[:2] == ["__/up.png", "a_b/etc/absolute.png"]
    assert files[2] == "class_names.json"
    assert files[3].startswith("con_/xxx")
    assert len(files[3]) == len("con_/") + 200
    assert all(path.resolve().is_relative_to(root) for path in root.rglob("*"))
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["x"]


def test_what_is_there_is_not_replaced_unasked(small_sample, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine: is there already"):
        dlc.export(small_sample, KEPT, tmp_path / "mine", form="image_folder")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    dlc.export(small_sample, KEPT, tmp_path / "x.txt", form="ids")
    dlc.export(small_sample, KEPT[:2], tmp_path / "x.txt", form="ids", overwrite=True)
    assert len((tmp_path / "x.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_replaces_a_file_or_a_link_if_asked(small_sample, tmp_path, kind):
    place, mine = tmp_path / "x", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    if kind == "file":
        place.write_text("old")
    else:
        place.symlink_to(mine)
    dlc.export(small_sample, KEPT, place, form="hf", overwrite=True)
    assert len(dlc.load_dataset(f"hf:{place}/train")) == len(KEPT)
    assert (mine / "thesis.txt").exists()


def test_a_link_that_leads_nowhere_is_not_replaced_unasked(small_sample, tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="x: is there already"):
        dlc.export(small_sample, KEPT, tmp_path / "x", form="ids")


def test_large_images_are_written_in_smaller_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("dlc_jax.exports.forms._BYTES", 5000)
    images = [encoded(image) for image in random_images(6, 25)]
    assert 1667 < min(map(len, images)) <= max(map(len, images)) < 2500
    dataset = dlc.array_dataset(images, [0, 1] * 3, ids=list("abcdef"))
    dlc.export(dataset, np.arange(6), tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.num_row_groups == 3
    back = dlc.load_dataset(f"parquet:{tmp_path}/x.parquet")
    assert [back[i].image for i in range(6)] == images


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"form": "parqet"}, "Did you mean 'parquet'"),
        ({"part": "keep"}, "export part: unknown value 'keep'; valid: kept, dropped"),
        ({"kept": [60]}, "out of range"),
        ({"kept": np.arange(60), "part": "dropped"}, "nothing is dropped"),
        ({"path": "/proc/x/y.parquet"}, "cannot be written"),
    ],
)
def test_exports_that_cannot_be(small_sample, tmp_path, arguments, says):
    arguments = {"kept": KEPT, "path": tmp_path / "x", **arguments}
    with pytest.raises(ValueError, match=says):
        dlc.export(small_sample, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_sample_that_cannot_be_read_leaves_nothing_half_written(small_sample, tmp_path):
    images = [small_sample[i].image for i in range(60)]
    images[40] = b"no image"
    ids = np.array([str(i) for i in range(60)])
    broken = dlc.Dataset(images, small_sample.labels, ids, small_sample.class_names)
    with pytest.raises(ValueError, match="sample '40' is not a readable image"):
        dlc.export(broken, KEPT, tmp_path / "x", form="image_folder")
    assert not list(tmp_path.iterdir())


def test_large_selections_are_written_in_pieces(tmp_path):
    pixels = random_images(600, 4)
    dataset = dlc.array_dataset(pixels, np.arange(600) % 3, ids=[str(i) for i in range(600)])
    dlc.export(dataset, np.arange(600), tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.num_row_groups == 3
    assert dlc.load_dataset(f"parquet:{tmp_path}/x.parquet").ids.tolist() == dataset.ids.tolist()
