"""The configuration files: each is one command, and says what it needs."""

import re
import runpy

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.datasets import SOURCES

FILES = sorted((ROOT / "configs").glob("*.py"))
# file -> what its docstring calls the data set, and the number of its classes
NAMED = {
    "dtd": ("DTD", 47),
    "deep_weeds": ("DeepWeeds", 9),
    "fgvc_aircraft": ("FGVC-Aircraft", 100),
    "cxrb10": ("CXRB10", 10),
    "sketch": ("Sketch", 250),
}


def read(name: str) -> tuple[str, ConfigDict]:
    """Returns docstring and configuration."""
    scope = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    return scope["__doc__"], scope["get_config"]()


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_every_file_is_valid_and_its_command_names_it(name):
    doc, values = read(name)
    config = Config.of(values)
    assert config.encoder.weights
    for source in (config.dataset.train, config.dataset.test or config.dataset.train):
        known = {"jsonl", "json", "parquet"} if config.is_of_instructions else SOURCES
        assert source.partition(":")[0] in known
    commands = re.findall(r"^python -m dlc_jax\.main .*--config=(\S+)", doc, re.MULTILINE)
    assert commands == [f"configs/{name}.py"]


@pytest.mark.parametrize("name", NAMED)
def test_named_data_sets_say_what_they_are(name):
    doc, values = read(name)
    title, num_classes = NAMED[name]
    assert doc.startswith(f"Prunes {title} ")
    assert "ResNet-18" in doc.splitlines()[0]
    assert values.encoder.name == "resnet18"
    for line in ("Needs", "Data", "Licence", "Classes", "Splits", "Selects", "Expected"):
        assert re.search(rf"^{line}: \S", doc, re.MULTILINE), line
    assert re.search(rf"^Classes: {num_classes}\b", doc, re.MULTILINE)
    assert values.dataset.train != values.dataset.test


def write_sketches(root) -> None:
    for name in ("airplane", "zebra"):
        (root / name).mkdir(parents=True)
        for i in range(80):  # as many as the published archive has in a class
            (root / name / f"{i}.png").write_bytes(f"{name} {i}".encode())
    (root / "filelist.txt").write_text("airplane/0.png\n")


def test_sketch_splits_a_folder_of_classes(tmp_path, monkeypatch):
    write_sketches(tmp_path / "data" / "sketch")
    monkeypatch.chdir(tmp_path)
    _, values = read("sketch")
    train, test = (dlc.load_dataset(values.dataset[key]) for key in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [64, 64]
    assert np.bincount(test.labels).tolist() == [16, 16]
    assert not set(train.ids) & set(test.ids)
    assert train.class_names == test.class_names == ("airplane", "zebra")


def test_the_other_way_that_sketch_names_reads_folders_of_splits(tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        write_sketches(tmp_path / "data" / "Sketch" / split)
    monkeypatch.chdir(tmp_path)
    doc, _ = read("sketch")
    sources = dict(re.findall(r"--config\.dataset\.(train|test)=(\S+?)\.?(?:\s|$)", doc))
    assert len(dlc.load_dataset(sources["train"])) == 320
    assert len(dlc.load_dataset(sources["test"])) == 160


def test_deep_weeds_splits_what_tfds_has_in_one(monkeypatch, sample):
    asked = []

    def load_tfds(where: str) -> dlc.Dataset:
        asked.append(where)
        return sample

    monkeypatch.setitem(SOURCES, "tfds", load_tfds)
    _, values = read("deep_weeds")
    train, test = (dlc.load_dataset(values.dataset[key]) for key in ("train", "test"))
    assert asked == ["deep_weeds/train"] * 2
    assert (len(train), len(test)) == (600, 150)
    assert set(train.ids) | set(test.ids) == set(sample.ids)
