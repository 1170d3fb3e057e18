"""The configuration files: each is one command, and says what it needs."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

import dlc_jax as dlc
from dlc_jax import presets
from dlc_jax.config import Config
from dlc_jax.datasets import SOURCES
from dlc_jax.datasets.row_sources import ROW_SOURCES

FILES = sorted((ROOT / "configs").glob("*.py"))
# file -> what its docstring calls the data set, and the number of its classes
NAMED = {
    "dtd": ("DTD", 47),
    "deep_weeds": ("DeepWeeds", 9),
    "fgvc_aircraft": ("FGVC-Aircraft", 100),
    "cxrb10": ("CXRB10", 10),
    "sketch": ("Sketch", 250),
}

# of instructions: file -> source, and how many thousands of rows
CHOICES = {
    "alpaca_cleaned": ("hf:yahma/alpaca-cleaned/train", 52),
    "dolly_hhrlhf": ("hf:mosaicml/dolly_hhrlhf/train", 59),
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
        known = ROW_SOURCES if config.data_kind.name == "instructions" else SOURCES
        assert source.partition(":")[0] in known
    commands = re.findall(r"^python -m dlc_jax\.main .*--config=(\S+)", doc, re.MULTILINE)
    choice = f":{presets.DEFAULT_MODEL}" if name in CHOICES else ""
    assert commands == [f"configs/{name}.py{choice}"]


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


@pytest.mark.parametrize("name", CHOICES)
def test_instructions_are_for_any_model_of_the_paper(name):
    scope = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    doc, get_config = scope["__doc__"], scope["get_config"]
    source, num_thousands = CHOICES[name]
    for line in ("Models", "Needs", "Data", "Licence", "Selects", "Expected"):
        assert re.search(rf"^{line}: \S", doc, re.MULTILINE), line
    assert re.search(rf"^Rows: about {num_thousands},000\b", doc, re.MULTILINE)
    assert get_config().to_dict() == get_config(presets.DEFAULT_MODEL).to_dict()
    for model, weights in presets.LANGUAGE_MODELS.items():
        config = Config.of(get_config(model))
        assert (config.dataset.train, config.encoder.weights) == (source, weights)
        assert f"{model} ({weights}" in " ".join(doc.split())
        assert (config.probe.num_probes, config.probe.placement) == (8, "midpoint")
        assert config.probe.dtype == "bfloat16"
        assert config.selection.keep_fractions == tuple(i / 10 for i in range(1, 10))
    with pytest.raises(ValueError, match="Did you mean 'llama3-8b'"):
        get_config("llama3")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("model", presets.LANGUAGE_MODELS)
def test_the_released_codes_settings_are_a_choice_of_every_model(name, model):
    """As published: TRL's trainer with LoRA, and score.py with its three passes."""
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    config = Config.of(get_config(f"{model},official"))
    assert (config.dataset.train, config.mode) == (CHOICES[name][0], "official")
    assert config.encoder.weights == presets.LANGUAGE_MODELS[model]
    assert (config.dataset.template, config.dataset.turns) == ("released", "first")
    assert [cell.name for cell in config.selection.cells()] == [
        "flexrand/keep_0.50-split_0.25-seed_1",
        "flexrand/keep_0.50-split_0.75-seed_1",
        "random/keep_0.50-seed_1",
    ]
    lora = config.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.05)
    assert (lora.optimiser, lora.learning_rate, lora.weight_decay) == ("adamw", 5e-4, 5e-4)
    assert (lora.epochs, lora.batch_size, lora.warmup_steps) == (1, 4, 100)
    assert (lora.loss_on, lora.drop_last, config.encoder.max_length) == ("text", True, 1024)
    with pytest.raises(ValueError, match=f"what follows '{model}': unknown value 'offical'"):
        get_config(f"{model},offical")


@pytest.mark.parametrize(
    ("configuration", "name"),
    [
        ("configs/demo.py", "demo"),
        ("configs/alpaca_cleaned.py:llama3-8b", "alpaca_cleaned-llama3-8b"),
        ("configs/alpaca_cleaned.py:llama3-8b,official", "alpaca_cleaned-llama3-8b_official"),
        ("/a.b/my.py:v0.3", "my-v0.3"),
        ("my.py:../a b", "my-.._a_b"),
        ("my.py:", "my"),
    ],
)
def test_runs_of_two_choices_do_not_share_a_folder(configuration, name):
    assert presets.run_name(configuration) == name


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("alpaca_cleaned.py:llama3", "cannot load it: model: unknown value 'llama3'; valid: mist"),
        ("demo.py:llama3", "cannot load it: TypeError: get_config"),
    ],
)
def test_an_unknown_choice_ends_in_one_clear_line(choice, says):
    command = [sys.executable, "-m", "dlc_jax.main", f"--config=configs/{choice}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


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

    def load_tfds(where: str, _: object) -> dlc.Dataset:
        asked.append(where)
        return sample

    monkeypatch.setitem(SOURCES, "tfds", load_tfds)
    _, values = read("deep_weeds")
    train, test = (dlc.load_dataset(values.dataset[key]) for key in ("train", "test"))
    assert asked == ["deep_weeds/train"] * 2
    assert (len(train), len(test)) == (600, 150)
    assert set(train.ids) | set(test.ids) == set(sample.ids)
