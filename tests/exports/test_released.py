"""Positions for the released code, read back as it reads them: through torchvision's data sets."""

import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, encoded, record_scores, require_shared
from PIL import Image

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.exports.released import released_order, released_path, released_positions
from dlc_jax.preprocess.decode import decode
from dlc_jax.selection import Cell
from dlc_jax.stages import pipeline
from dlc_jax.workspace import artefacts

VARIANTS = ("737-700", "F-16A/B", "Tu-134")


class Picture(NamedTuple):
    """What the layouts are built of."""

    class_name: str
    file: str
    content: bytes
    split: str


@pytest.fixture(scope="module")
def vision(timm):
    from torch.utils.data import ConcatDataset, Subset
    from torchvision import datasets

    return SimpleNamespace(datasets=datasets, ConcatDataset=ConcatDataset, Subset=Subset)


@pytest.fixture(scope="module")
def pictures(sample) -> list[Picture]:
    """Six of each of three classes, mixed; file names repeat from class to class."""
    found = []
    for label in (2, 0, 1):
        for place, i in enumerate(np.flatnonzero(sample.labels == label)[:6]):
            name = sample.class_names[label]
            split = "val" if place in (0, 3) else "train"
            found.append(Picture(name, sample.ids[i].split("/")[1], sample[int(i)].image, split))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def build_dtd(root: Path, pictures: list[Picture]) -> None:
    data = root / "dtd" / "dtd"
    for picture in pictures:
        write(data / "images" / picture.class_name / picture.file, picture.content)
    for split in ("train", "val"):
        names = [f"{p.class_name}/{p.file}\n" for p in pictures if p.split == split]
        write(data / "labels" / f"{split}1.txt", "".join(names))


def build_aircraft(root: Path, pictures: list[Picture]) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = sorted({p.class_name for p in pictures})
    lines = {"train": [], "val": []}
    for number, picture in enumerate(pictures):
        name = f"{(number * 7919) % 1000:07d}"
        write(data / "images" / f"{name}.jpg", picture.content)
        lines[picture.split].append(f"{name} {VARIANTS[classes.index(picture.class_name)]}\n")
    lines["trainval"] = sorted(lines["train"] + lines["val"])
    for split, some in lines.items():
        write(data / f"images_variant_{split}.txt", "".join(some))
    write(data / "variants.txt", "\n".join(reversed(VARIANTS)))


def build_folders(root: Path, pictures: list[Picture], name: str = "Sketch") -> None:
    for picture in pictures:
        write(root / name / picture.split / picture.class_name / picture.file, picture.content)


def build_all(root: Path, pictures: list[Picture]) -> Path:
    build_dtd(root, pictures)
    build_aircraft(root, pictures)
    build_folders(root, pictures)
    write_parquet(root / "mixed.parquet", pictures[::-1])
    return root


def write_parquet(path: Path, pictures: list[Picture]) -> None:
    rows = [{"bytes": p.content, "path": f"{p.class_name}/{p.file}"} for p in pictures]
    pq.write_table(pa.table({"image": rows, "label": [p.class_name for p in pictures]}), path)


def training_set(vision, root: Path, name: str):
    """As the released fine-tuning makes it, and the files in its order."""
    if name == "DTD":
        parts = [vision.datasets.DTD(root, split=split) for split in ("train", "val")]
        files = [file for part in parts for file in part._image_files]
    elif name == "FGVCAircraft":
        parts = [vision.datasets.FGVCAircraft(root, split=split) for split in ("train", "val")]
        files = [file for part in parts for file in part._image_files]
    else:
        parts = [vision.datasets.ImageFolder(root / name / split) for split in ("train", "val")]
        files = [file for part in parts for file, _ in part.samples]
    assert parts[0].classes == parts[1].classes
    return vision.ConcatDataset(parts), [Path(file) for file in files], parts[0].classes


def read_back(vision, root: Path, name: str, positions: np.ndarray) -> set[tuple]:
    """(class name, file name, pixels) of the samples that the released code would train on."""
    whole, files, classes = training_set(vision, root, name)
    some = vision.Subset(whole, positions)
    rows = [(*some[i], files[p].name) for i, p in enumerate(positions)]
    return {(classes[label], file, image.size, image.tobytes()) for image, label, file in rows}


def held(dataset: dlc.Dataset, positions: np.ndarray) -> set[tuple]:
    found = set()
    for i in positions.tolist():
        image = decode(dataset[i].image, dataset[i].id)
        name = dataset.class_names[dataset.labels[i]]
        found.add((name, dataset[i].id.split("/")[-1], image.size, image.tobytes()))
    return found


def chosen(dataset: dlc.Dataset) -> dlc.Selection:
    scores = np.random.default_rng(1).normal(size=len(dataset))
    return dlc.select(scores, dataset.labels, keep_fraction=0.5, split=0.5, ids=dataset.ids)


SOURCES = [
    ("DTD", "folder:{}/dtd/dtd/images"),
    ("DTD", "parquet:{}/mixed.parquet"),
    ("DTD", "folder:{}/Sketch/val+train"),
    ("Sketch", "folder:{}/Sketch/val+train"),
    ("Sketch", "parquet:{}/mixed.parquet"),
    ("FGVCAircraft", "fgvc_aircraft:{}/fgvc-aircraft-2013b/trainval"),
    ("FGVCAircraft", "fgvc_aircraft:{}/fgvc-aircraft-2013b/val+train"),
]


@pytest.mark.parametrize("part", ["kept", "dropped"])
@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_torchvision_finds_the_same_images(vision, pictures, tmp_path, name, source, part):
    root = build_all(tmp_path, pictures)
    dataset = dlc.load_dataset(source.format(root))
    kept = chosen(dataset)
    positions = released_positions(dataset, kept, root, name, part)
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    there = np.isin(dataset.ids, kept.ids) == (part == "kept")
    assert 6 <= there.sum() == len(positions) <= 12
    expected = held(dataset, np.flatnonzero(there))
    assert read_back(vision, root, name, positions) == expected
    assert set(positions) != set(np.flatnonzero(there))  # the orders differ, so that it matters


def test_arrays_and_images_encoded_anew_are_found_by_their_pixels(vision, pictures, tmp_path):
    root = build_all(tmp_path, pictures)
    grey = encoded(np.arange(600, dtype=np.uint8).reshape(20, 30))
    write(root / "Sketch" / "train" / "bonsai" / "grey.png", grey)
    content = [*(p.content for p in pictures), grey]
    pixels = [np.asarray(decode(image, "")) for image in content]
    images = [encoded(array) if i % 2 else array for i, array in enumerate(pixels)]
    images[-1] = np.asarray(Image.open(root / "Sketch/train/bonsai/grey.png"))[:, :, None]
    dataset = dlc.array_dataset(
        images,
        [*(p.class_name for p in pictures), "bonsai"],
        ids=[*(f"{p.class_name}/{p.file}" for p in pictures), "grey.png"],
    )
    assert images[-1].shape == (20, 30, 1)
    some = np.array([18, 0, 3, 4, 11])
    positions = released_positions(dataset, some, root, "Sketch")
    assert read_back(vision, root, "Sketch", positions) == held(dataset, some)


def test_names_that_repeat_are_told_apart_by_their_folders(vision, pictures, tmp_path):
    paths = (
        "train/a/image.jpg",
        "val/a/image.jpg",
        "val/a/deep/image.jpg",
        "train/b/image.jpg",
        "val/b/image.jpg",
    )
    for path, picture in zip(paths, pictures, strict=False):
        write(tmp_path / "Twice" / path, picture.content)
    dataset = dlc.load_dataset(f"folder:{tmp_path}/Twice/val+train")
    assert set(dataset.ids) == set(paths)
    for i in range(5):
        positions = released_positions(dataset, [i], tmp_path, "Twice")
        assert read_back(vision, tmp_path, "Twice", positions) == held(dataset, np.array([i]))
    bare = dlc.load_dataset(f"folder:{tmp_path}/Twice/train")  # could be those of val
    with pytest.raises(ValueError, match="a/image.jpg could be .*train/a/image.jpg or .*val/a"):
        released_positions(bare, [0], tmp_path, "Twice")


def test_names_are_found_in_either_form_of_unicode(vision, pictures, tmp_path):
    composed = [p._replace(class_name=f"é {p.class_name}", file=f"ö {p.file}") for p in pictures]
    apart = [
        p._replace(
            **{k: unicodedata.normalize("NFD", getattr(p, k)) for k in ("class_name", "file")}
        )
        for p in composed
    ]
    build_folders(tmp_path / "theirs", apart, "Any")
    for some, root in ((composed, tmp_path / "nfc"), (apart, tmp_path / "nfd")):
        build_folders(root, some, "Any")
        dataset = dlc.load_dataset(f"folder:{root}/Any/train+val")
        positions = released_positions(dataset, chosen(dataset), tmp_path / "theirs", "Any")
        found = read_back(vision, tmp_path / "theirs", "Any", positions)
        assert {content for *_, content in found} == {
            content for *_, content in held(dataset, chosen(dataset).indices)
        }


def test_the_order_is_torchvisions(vision, tmp_path):
    names = (
        *("Zebra/1.jpg", "Zebra/10.JPG", "Zebra/2.jpeg", "aa/x.png", "aa/sub/y.tif"),
        *("aa/sub.b/z.tiff", "aa/sub/deep/u.webp", "aa/notes.txt", "aa/._x.png", ".hidden/h.bmp"),
        *("b-c/i.gif", "b-c/i.pgm", "b/.jpg", "é/ü.ppm"),
    )
    for split in ("train", "val"):
        for name in names:
            write(tmp_path / "Any" / split / name, b"")
    (tmp_path / "Any" / "train" / "linked").symlink_to(tmp_path / "Any" / "val" / "aa")
    (tmp_path / "Any" / "val" / "linked").symlink_to(tmp_path / "Any" / "val" / "Zebra")
    (tmp_path / "Any" / "train" / "b" / "linked").symlink_to(tmp_path / "Any" / "val" / "aa")
    _, files, classes = training_set(vision, tmp_path, "Any")
    order = released_order(tmp_path, "Any")
    assert [entry.path for entry in order] == files
    assert [entry.path.name for entry in order] == [file.name for file in files]
    assert sorted({entry.class_name for entry in order}) == classes
    assert len(files) == 2 * 12 + 2 * 5 + 3


def test_the_texture_set_as_it_was_published(vision, tmp_path):
    parts = {"train": "train.parquet", "val": "validation.parquet"}
    where = require_shared("dtd10")
    rows = []
    for split, file in parts.items():
        part = dlc.load_dataset(f"parquet:{where}/{file}")
        for row in map(part.__getitem__, range(len(part))):
            name = part.class_names[row.label]
            rows.append(Picture(name, row.id.split("/")[-1], row.image, split))
    build_dtd(tmp_path, sorted(rows))
    dataset = dlc.load_dataset(f"parquet:{where}/validation+train.parquet")
    kept = dlc.select(
        np.random.default_rng(2).normal(size=len(dataset)),
        dataset.labels,
        method="hardest",
        keep_fraction=0.1,
        ids=dataset.ids,
    )
    positions = released_positions(dataset, kept, tmp_path, "DTD")
    assert len(positions) == 80
    assert read_back(vision, tmp_path, "DTD", positions) == held(dataset, kept.indices)


def without_names(pictures, root):
    return dlc.array_dataset([p.content for p in pictures], [p.class_name for p in pictures])


def with_another_file(pictures, root):
    return renamed(pictures, {0: "other.jpg"})


def with_another_class(pictures, root):
    return dlc.array_dataset(
        [pictures[0].content], ["jeep"], ids=[f"{pictures[0].class_name}/{pictures[0].file}"]
    )


def with_two_of_a_name(pictures, root):
    first = pictures[0]
    again = pictures.index(next(p for p in pictures[1:] if p.class_name == first.class_name))
    return renamed(pictures, {again: f"again/{first.file}", 0: f"and/{first.file}"})


def with_changed_pixels(pictures, root):
    pixels = np.array(decode(pictures[0].content, ""))
    pixels[3, 4, 1] ^= 1
    return renamed(pictures, {}, {0: encoded(pixels)})


def with_another_shape(pictures, root):
    pixels = np.asarray(decode(pictures[0].content, ""))  # the same bytes in rows of other length
    return renamed(pictures, {}, {0: pixels.reshape(pixels.shape[1], pixels.shape[0], 3)})


def without_its_file(pictures, root):
    (root / "dtd" / "dtd" / "images" / pictures[0].class_name / pictures[0].file).unlink()
    return renamed(pictures, {})


def with_a_broken_file(pictures, root):
    path = root / "dtd" / "dtd" / "images" / pictures[0].class_name / pictures[0].file
    path.write_bytes(path.read_bytes()[:300])
    return renamed(pictures, {})


def with_a_line_twice(pictures, root):
    with open(root / "dtd" / "dtd" / "labels" / "val1.txt", "a") as file:
        file.write(f"{pictures[0].class_name}/{pictures[0].file}\n")
    return renamed(pictures, {})


def with_an_empty_line(pictures, root):
    path = root / "dtd" / "dtd" / "labels" / "val1.txt"
    path.write_text("\n" + path.read_text())
    return renamed(pictures, {})


def without_a_list(pictures, root):
    (root / "dtd" / "dtd" / "labels" / "train1.txt").unlink()
    return renamed(pictures, {})


def without_a_class_in_validation(pictures, root):
    path = root / "dtd" / "dtd" / "labels" / "val1.txt"
    name = pictures[0].class_name
    lines = [line for line in path.read_text().splitlines() if not line.startswith(name)]
    path.write_text("\n".join(lines))
    return renamed(pictures, {})


def renamed(pictures, files, images=()) -> dlc.Dataset:
    """The pictures with some file names or images replaced."""
    names = [files.get(i, p.file) for i, p in enumerate(pictures)]
    return dlc.array_dataset(
        [dict(images).get(i, p.content) for i, p in enumerate(pictures)],
        [p.class_name for p in pictures],
        ids=[
            name if "/" in name else f"{p.class_name}/{name}"
            for name, p in zip(names, pictures, strict=True)
        ],
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_names, "id '[0-9a-f]{16}' is no file name.*expected ids such as banded/"),
        (with_another_file, r"/other.jpg' is not in train and val of DTD in .* 'other.jpg' of"),
        (with_another_class, "is not in train and val of DTD .* of class 'jeep'"),
        (with_two_of_a_name, "ids and/image_.* and again/image_.* could both be .*/images/"),
        (with_changed_pixels, "holds another image than sample .* expected the same pixels"),
        (with_another_shape, "holds another image than .* x .* and .* x "),
        (without_its_file, "cannot be compared with .*No such file"),
        (with_a_broken_file, "dtd/dtd/images/.* is not a readable image"),
        (with_a_line_twice, "could be .* or .*expected an id whose folders"),
        (with_an_empty_line, "val1.txt, line 1: expected <class>/<file>, found ''"),
        (without_a_list, "train1.txt: cannot be read"),
        (without_a_class_in_validation, "is in one of train and val only"),
    ],
)
def test_samples_that_cannot_be_placed(pictures, tmp_path, make, says):
    build_dtd(tmp_path, pictures)
    released_positions(renamed(pictures, {}), [0, 1], tmp_path, "DTD")
    dataset = make(pictures, tmp_path)
    with pytest.raises(dlc.InputError, match=says):
        released_positions(dataset, [0], tmp_path, "DTD")


def test_only_what_is_exported_has_to_be_there(pictures, tmp_path):
    build_dtd(tmp_path, pictures)
    dataset = with_changed_pixels(pictures, tmp_path)
    assert len(released_positions(dataset, [1, 2], tmp_path, "DTD")) == 2
    with pytest.raises(dlc.InputError, match="another image"):
        released_positions(dataset, [1, 2], tmp_path, "DTD", "dropped")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dtd", "dtd/train: no such folder; expected train and val in .*DTD and FGVCAircraft"),
        ("FGVCAircraft", "images_variant_train.txt: cannot be read"),
        ("../x", "export.released_name: expected .* got '../x'"),
        ("Empty", "Empty/train/a: expected images .* found none"),
    ],
)
def test_data_sets_that_are_not_there(pictures, tmp_path, name, says):
    (tmp_path / "Empty" / "train" / "a").mkdir(parents=True)
    (tmp_path / "Empty" / "val" / "a").mkdir(parents=True)
    with pytest.raises(dlc.InputError, match=says):
        released_positions(renamed(pictures, {}), [0], tmp_path, name)


CELL = {
    "seed": 3,
    "name": "DTD",
    "method": "flexrand",
    "split": 0.05,
    "masking": "l1",
    "step": 0.02,
    "num_probes": 50,
    "pretrain": "fully",
    "arch": "resnet18",
    "keep_fraction": 0.1,
}


def path_of(**changes) -> Path:
    facts = {**CELL, **changes}
    cell = Cell(*(facts.pop(name) for name in Cell._fields))
    path = dlc.PathSpec(**{name: facts.pop(name) for name in ("masking", "step", "num_probes")})
    return released_path("idxs", cell, path, **facts)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "seed_3/DTD/lwot-l1-s5-i20_f50/pt_fully-arch_resnet18/0.1.npy"),
        (
            {"method": "easiest", "split": None, "masking": "random", "step": 0.005},
            "seed_3/DTD/lwot-random-e-i5_f50/pt_fully-arch_resnet18/0.1.npy",
        ),
        (
            {"method": "hardest", "split": None, "pretrain": "weakly", "num_probes": 2},
            "seed_3/DTD/lwot-l1-h-i20_f2/pt_weakly-arch_resnet18/0.1.npy",
        ),
        (
            {"method": "k_center_greedy", "split": None, "arch": "vit_small_patch16_224"},
            "seed_3/DTD/kcentergreedy/pt_fully-arch_vit_small/0.1.npy",
        ),
        (
            {"method": "random", "split": None, "arch": "vit_base_patch16_224", "step": 0.33333},
            "seed_3/DTD/random/pt_fully-arch_vit_base/0.1.npy",
        ),
    ],
)
def test_paths_are_those_of_the_released_code(changes, path):
    assert path_of(**changes) == Path("idxs") / path


def test_every_cell_of_the_released_grid_has_its_name():
    for i in range(1, 20):
        for split in (0.05 * i, i / 20):
            path = path_of(split=split)
            assert path.parts[3] == f"lwot-l1-s{int(0.05 * i * 100)}-i20_f50"
    for ratio in range(1, 100):
        for keep_fraction in (ratio / 100, ratio * 0.01, 1 - (100 - ratio) / 100):
            path = path_of(keep_fraction=keep_fraction)
            assert path.name == f"{ratio / 100}.npy"
    assert path_of(split=0.29).parts[3] == "lwot-l1-s29-i20_f50"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split": 0.333}, "split: the released layout has whole multiples of 0.01 only, got 0.33"),
        ({"split": None}, "split: expected a number, got None"),
        ({"split": 1.0}, "split: must be < 1"),
        ({"step": 0.0205}, "probe.step: .* whole multiples of 0.001 only, got 0.0205"),
        ({"pretrain": "full"}, "export.pretrain: unknown value 'full'.*Did you mean 'fully'"),
        ({"name": ".."}, "export.released_name"),
    ],
)
def test_cells_that_have_no_name_there(changes, says):
    with pytest.raises(dlc.InputError, match=says):
        path_of(**changes)


def settings(root: Path, **changes) -> dict:
    """Of a run that selects and exports."""
    selection = {"methods": ("flexrand", "random"), "keep_fractions": (0.5,), "seeds": (4,)}
    export = {"forms": ("released",), "datasets_dir": str(root), "released_name": "Sketch"}
    values = {
        "stages": ("select", "export"),
        "dataset": {"train": f"folder:{root}/Sketch/val+train"},
        "selection": selection,
        "export": export,
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values[group][name] = value
    return values


def scored(workdir: Path, source: str, num_probes: int = 3, **probe) -> dlc.Dataset:
    """Leaves scores as the stage `score` does."""
    dataset = dlc.load_dataset(source)
    scores = np.random.default_rng(3).normal(size=len(dataset)).astype(np.float32)
    artefacts.write_losses(
        workdir,
        losses=np.tile(scores, (num_probes, 1)),
        sparsity=np.linspace(0, 0.5, num_probes, dtype=np.float32),
        labels=dataset.labels,
        ids=dataset.ids,
    )
    samples = artefacts.ScoredSamples(
        dataset.ids, dataset.labels, dataset.class_names, {"dlc": scores}
    )
    artefacts.write_scores(workdir, samples)
    made_with = {
        "mode": "default",
        "seed": 0,
        "encoder": {"name": "vit_base_patch16_224"},
        "probe": {
            "masking": "random", "step": 0.05, "num_probes": 3, "placement": "grid", **probe
        },
    }  # fmt: skip
    facts = {"dataset": {"source": source, "fingerprint": dataset.fingerprint}}
    record_scores(workdir, facts, made_with)
    return dataset


def test_the_stage_names_what_the_scores_were_made_with(vision, pictures, tmp_path):
    root, workdir = build_all(tmp_path / "data", pictures), tmp_path / "run"
    values = settings(root, export__parts=("kept", "dropped"), export__forms=("ids", "released"))
    dataset = scored(workdir, values["dataset"]["train"])
    said = []
    for _ in range(2):  # again over what is there
        pipeline.run(Config.of(values), workdir, said.append)
    assert "export: 8 exports of 2 selections written" in said
    for method, principle in (("flexrand", "lwot-random-s50-i50_f3"), ("random", "random")):
        below = f"seed_4/Sketch/{principle}/pt_fully-arch_vit_base/0.5.npy"
        cell = "keep_0.50-split_0.50-seed_4" if method == "flexrand" else "keep_0.50-seed_4"
        kept = np.load(workdir / "selections" / method / f"{cell}.npy")
        assert len((workdir / "exports" / method / cell / "kept.txt").read_text().split()) == 9
        for folder, expected in (("idxs", kept), ("idxs-dropped", np.setdiff1d(range(18), kept))):
            positions = np.load(workdir / "exports" / folder / below).astype(int)
            assert (np.diff(positions) > 0).all()
            assert read_back(vision, root, "Sketch", positions) == held(dataset, expected)
    assert len(list((workdir / "exports").rglob("*.npy"))) == 4
    assert not [path for path in workdir.rglob("*") if path.name.startswith(".")]


def test_a_path_cut_short_is_named_by_its_length(vision, pictures, tmp_path):
    root, workdir = build_all(tmp_path / "data", pictures), tmp_path / "run"
    values = settings(root)
    dataset = scored(workdir, values["dataset"]["train"], num_probes=2)
    pipeline.run(Config.of(values), workdir, lambda line: None)
    folder = workdir / "exports/idxs/seed_4/Sketch/lwot-random-s50-i50_f2"
    positions = np.load(folder / "pt_fully-arch_vit_base" / "0.5.npy")
    kept = np.load(workdir / "selections/flexrand/keep_0.50-split_0.50-seed_4.npy")
    assert read_back(vision, root, "Sketch", positions) == held(dataset, kept)


def test_probes_spread_over_the_path_are_refused_where_they_matter(pictures, tmp_path):
    root, workdir = build_all(tmp_path / "data", pictures), tmp_path / "run"
    values = settings(root)
    scored(workdir, values["dataset"]["train"], placement="midpoint")
    with pytest.raises(dlc.InputError, match="probe.placement: the scores .* 'midpoint', for"):
        pipeline.run(Config.of(values), workdir, lambda line: None)
    assert not (workdir / "exports").exists()
    values["selection"]["methods"] = ("random",)
    pipeline.run(Config.of(values), workdir, lambda line: None)
    assert len(list((workdir / "exports" / "idxs").rglob("0.5.npy"))) == 1


def test_settings_and_scores_that_cannot_be_named(pictures, tmp_path):
    root, workdir = build_all(tmp_path / "data", pictures), tmp_path / "run"
    scored(workdir, settings(root)["dataset"]["train"])
    for key, value, says in (
        ("selection__splits", (0.25, 0.333), "split: the released layout has whole"),
        ("selection__splits", (0.3, 0.1 + 0.2), "two cells have one name in the released"),
        ("export__datasets_dir", f"{root}/no", "no/Sketch/train: no such folder"),
    ):
        with pytest.raises(dlc.InputError, match=says):
            pipeline.run(Config.of(settings(root, **{key: value})), workdir, lambda line: None)
        assert not (workdir / "exports").exists()
    (workdir / "records" / "score.json").unlink()
    with pytest.raises(dlc.InputError, match="which says with what the scores were made"):
        pipeline.run(Config.of(settings(root)), workdir, lambda line: None)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("export__datasets_dir", None, "export.datasets_dir: missing; the form 'released' needs"),
        ("export__released_name", None, "export.released_name: missing"),
        ("export__released_name", "a/b", "export.released_name: expected .* got 'a/b'"),
        ("export__pretrain", "partly", "export.pretrain: unknown value 'partly'"),
        ("export__forms", ("relased",), "export.forms: .*Did you mean 'released'"),
    ],
)
def test_settings_are_checked_for_this_form_only(tmp_path, key, value, says):
    values = settings(tmp_path, **{key: value})
    with pytest.raises(dlc.InputError, match=says):
        Config.of(values)
    values["export"]["forms"] = ("ids",)
    Config.of(values)


def test_the_function_export_says_where_the_form_is(small_sample, tmp_path):
    with pytest.raises(dlc.InputError, match="form of the stage 'export' only.*forms=released"):
        dlc.export(small_sample, [0], tmp_path / "x", form="released")


@pytest.mark.slow
def test_the_command_line(vision, pictures, tmp_path):
    build_dtd(tmp_path, pictures)

    def run(*arguments: str, code: int = 0) -> str:
        command = (
            sys.executable, "-m", "dlc_jax.main", "--config=configs/demo.py",
            f"--config.dataset.train=folder:{tmp_path}/dtd/dtd/images",
            f"--workdir={tmp_path}/run", "--config.selection.keep_fractions=(0.5,)", *arguments,
        )  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    small = "--config.encoder.image_size=32"
    run("--config.probe.num_probes=2", small)
    asked = (small, "--config.stages=('export',)", "--config.export.forms=released")
    assert "error: export.datasets_dir: missing" in run(*asked, code=2)
    asked += (f"--config.export.datasets_dir={tmp_path}", "--config.export.released_name=DTD")
    # 50 probes here are the default of the configuration; the scores have two
    assert "export: 4 exports of 4 selections" in run(*asked, "--config.export.pretrain=weakly")
    folder = tmp_path / "run" / "exports" / "idxs" / "seed_1" / "DTD"
    dataset = dlc.load_dataset(f"folder:{tmp_path}/dtd/dtd/images")
    for principle, cell in (
        ("lwot-l1-s50-i20_f2", "flexrand/keep_0.50-split_0.50-seed_1"),
        ("lwot-l1-e-i20_f2", "easiest/keep_0.50-seed_1"),
        ("lwot-l1-h-i20_f2", "hardest/keep_0.50-seed_1"),
        ("random", "random/keep_0.50-seed_1"),
    ):
        positions = np.load(folder / principle / "pt_weakly-arch_resnet18" / "0.5.npy").astype(int)
        kept = np.load(tmp_path / "run" / "selections" / f"{cell}.npy")
        assert read_back(vision, tmp_path, "DTD", positions) == held(dataset, kept)
    shutil.rmtree(tmp_path / "dtd" / "dtd" / "labels")
    assert "train1.txt: cannot be read" in run(*asked, code=2)
