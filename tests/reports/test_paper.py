"""The paper's numbers, as read, and beside those of runs written by hand."""

import csv
import doctest
import math
import runpy
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from dlc_jax import presets
from dlc_jax.reports import paper
from dlc_jax.reports.beside_paper import images_beside_paper, mmlu_beside_paper
from dlc_jax.reports.paper import (
    PaperAccuracy,
    PaperCost,
    PaperMmlu,
    PaperPath,
    PaperSplit,
    read_paper,
)
from dlc_jax.reports.results import Result
from dlc_jax.selection import SELECTORS

DATA_SETS = {"CXRB10", "DeepWeeds", "DTD", "FGVCAircraft", "Sketch"}
KEEP_FRACTIONS = {i / 10 for i in range(1, 10)}


def test_accuracies_of_images_are_those_of_the_figures():
    rows = read_paper(PaperAccuracy)
    assert len(rows) == 5 * 9 * 6
    assert {row.dataset for row in rows} == DATA_SETS
    assert {row.keep_fraction for row in rows} == KEEP_FRACTIONS
    assert set(Counter(row[:2] for row in rows).values()) == {9}
    found = {row[:3]: row[3:] for row in rows}
    assert found["DTD", "dlc_flexrand", 0.5] == (71.78, 0.09)
    assert found["CXRB10", "forgetting", 0.5] == (33.69, 0.0)
    accuracy, std = found["CXRB10", "random", 0.2]
    assert accuracy == 26
    assert math.isnan(std)
    assert {row.method for row in rows if math.isnan(row.std)} == {"random"}
    methods = {row.method.removeprefix("dlc_") for row in rows}
    assert methods <= SELECTORS.keys()


def test_validation_costs_path_and_mmlu_are_read():
    splits = {row[:3]: row.accuracy for row in read_paper(PaperSplit)}
    assert len(splits) == 5 * 9 * 19
    assert {split for *_, split in splits} == {round(0.05 * i, 2) for i in range(1, 20)}
    assert splits["CXRB10", 0.1, 0.05] == 22.53
    costs = {row.method: row[1:] for row in read_paper(PaperCost)}
    assert costs["dlc_flexrand"] == (29.5, 60.45)
    assert round(costs["forgetting"][0] / costs["dlc_flexrand"][0]) == 35  # of the abstract
    assert math.isnan(costs["random"][0])
    paths = read_paper(PaperPath)
    assert [row.num_probes for row in paths] == [1, 3, 5, 10, 20, 30, 40, 50]
    assert paths[-1] == PaperPath(50, 57.3, 0.51, 1000.0)
    assert isinstance(paths[0].num_probes, int)
    mmlu = {row[:3]: row[3:] for row in read_paper(PaperMmlu)}
    assert len(mmlu) == 2 * 3 * 4
    assert mmlu["dolly_hhrlhf", "gemma2-9b", "other"] == (69.51, 70.6)


def test_the_files_have_the_columns_that_are_read_and_are_installed():
    folder = Path(paper.__file__).parent
    kinds = (PaperAccuracy, PaperSplit, PaperCost, PaperPath, PaperMmlu)
    headers = set()
    for file in folder.glob("*.csv"):
        with open(file, newline="") as lines:
            headers.add(tuple(next(csv.reader(lines))))
    assert headers == {kind._fields for kind in kinds}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {
        path
        for pattern in settings["package-data"]["dlc_jax.reports.paper"]
        for path in folder.glob(pattern)
    }
    assert installed == {*folder.glob("*.csv"), folder / "README.md"}


def test_the_example_of_the_reader_runs():
    assert doctest.testmod(paper) == doctest.TestResults(0, 2)


DTD = ("tfds:dtd/train+validation", "tfds:dtd/test", 47, "resnet18", "timm/resnet18.tv_in1k")
RESULTS = [
    Result("full", 1.0, None, 1, 75.0),
    Result("random", 0.5, None, 1, 70.0),
    Result("random", 0.5, None, 2, 71.0),
    Result("flexrand", 0.5, 0.5, 1, 72.0),
    Result("flexrand", 0.5, 0.25, 1, 71.0),
    Result("hardest", 0.5, None, 1, 60.0),
    Result("random", 0.25, None, 1, 50.0),
]


def lines(text: str) -> list[list[str]]:
    """Cells of the rows of the table in a text."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_ours_stand_beside_theirs_with_the_difference():
    text = images_beside_paper(RESULTS, *DTD)
    assert "Beside the paper, DTD: test accuracy by the fraction kept" in text
    assert "Ours: resnet18, timm/resnet18.tv_in1k." in text
    assert "ResNet-18, fully pre-trained, three seeds; FlexRand at the split that was best" in text
    assert (
        "selection.variant=paper).\n\n|" in text
    )  # no word on the split, which is the official one
    assert lines(text) == [
        ["0.5", "random", "2", "70.50", "71.16", "-0.66", ""],
        ["0.5", "flexrand (split 0.25)", "1", "71.00", "71.78", "-0.78", "0.09"],
        ["0.5", "flexrand (split 0.5)", "1", "72.00", "71.78", "+0.22", "0.09"],
        ["0.5", "forgetting", "", "", "71.83", "", "1.42"],
        ["0.5", "entropy", "", "", "68.70", "", "0.97"],
        ["0.5", "k_center_greedy", "", "", "70.45", "", "0.54"],
        ["0.5", "contextual_diversity", "", "", "70.51", "", "1.15"],
        ["0.5", "hardest", "1", "60.00", "", "", ""],
        ["0.25", "random", "1", "50.00", "", "", ""],
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {0: "tfds:dtd/train"},
        {0: "parquet:../shared/dtd10/train+validation.parquet", 2: 10},
        {0: "folder:/mine/dtd"},
        {1: "tfds:dtd/validation"},
        {1: "folder:/mine/test"},
        {2: 46},
        {3: "resnet50"},
        {3: "vit_small_patch16_224"},
    ],
)
def test_other_data_tests_and_encoders_have_no_table(changed):
    given = [changed.get(place, value) for place, value in enumerate(DTD)]
    assert images_beside_paper(RESULTS, *given) == ""


def test_without_results_of_a_method_there_is_no_table():
    assert images_beside_paper(RESULTS[:1], *DTD) == ""


NAMES = {
    "dtd": ("DTD", 47),
    "dtd_sweep": ("DTD", 47),
    "deep_weeds": ("DeepWeeds", 9),
    "fgvc_aircraft": ("FGVCAircraft", 100),
    "sketch": ("Sketch", 250),
    "cxrb10": ("CXRB10", 10),
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_sources_of_the_configurations_are_known_and_no_other_ones(path):
    config = runpy.run_path(str(path))["get_config"]()
    name, num_classes = NAMES.get(path.stem, ("", 15))
    text = images_beside_paper(
        RESULTS,
        config.dataset.train,
        config.dataset.test or "",
        num_classes,
        "resnet18",
        config.encoder.weights,
    )
    assert text.startswith(f"Beside the paper, {name}:" if name else "")
    assert bool(text) == bool(name)
    assert ("Its split of this data set is not published." in text) == (
        name in ("DeepWeeds", "Sketch", "CXRB10")
    )
    if name:
        paper_random = {row[:3]: row.accuracy for row in read_paper(PaperAccuracy)}
        assert lines(text)[0][4] == f"{paper_random[name, 'random', 0.5]:.2f}"


@pytest.mark.parametrize(
    ("train", "test", "num_classes", "is_known"),
    [
        ("folder:data/DeepWeeds/train+val", "folder:data/DeepWeeds/test", 9, True),
        ("folder:/data/Sketch/train+val", "folder:/data/Sketch/test", 250, True),
        ("folder:/data/Sketch/train+val", "folder:/data/Sketch/test", 3, False),  # one's own
        ("folder:/data/Sketch/train", "folder:/data/Sketch/test", 250, False),
        ("fgvc_aircraft:/x/train+val", "fgvc_aircraft:/x/test", 100, True),
        ("fgvc_aircraft:/x/train", "fgvc_aircraft:/x/val", 100, False),
        ("split:80/20:train:folder:data/sketch", "split:80/20:validation:folder:x", 250, False),
    ],
)
def test_sources_that_docstrings_name_are_known_by_their_parts(train, test, num_classes, is_known):
    text = images_beside_paper(RESULTS, train, test, num_classes, "resnet18", "w")
    assert bool(text) == is_known


GROUPS = ("humanities", "social_sciences", "stem", "other")


def groups(*accuracies: float) -> dict[str, float]:
    return dict(zip(GROUPS, accuracies, strict=True)) | {"test_accuracy": 0.0}


def test_mmlu_stands_beside_theirs_by_group():
    measured = [
        (Result("base", 0.0, None, 0, 50.0), groups(1, 1, 1, 1)),
        (Result("random", 0.5, None, 1, 50.0), groups(52, 71, 50, 68)),
        (Result("random", 0.5, None, 2, 50.0), groups(53, 72, 51, 69)),
        (Result("random", 0.1, None, 1, 50.0), groups(1, 1, 1, 1)),
        (Result("flexrand", 0.5, 0.25, 1, 50.0), groups(55, 70, 60, 70.2)),
    ]
    source = ("hf:yahma/alpaca-cleaned/train", "mistralai/Mistral-7B-v0.3")
    text = mmlu_beside_paper(measured, *source)
    assert text.startswith("Beside the paper, alpaca_cleaned and mistral-7b: MMLU after LoRA on ha")
    assert lines(text) == [
        ["random", "humanities", "2", "52.50", "52.44", "+0.06"],
        ["random", "social_sciences", "2", "71.50", "71.89", "-0.39"],
        ["random", "stem", "2", "50.50", "51.74", "-1.24"],
        ["random", "other", "2", "68.50", "68.88", "-0.38"],
        ["flexrand (split 0.25)", "humanities", "1", "55.00", "54.75", "+0.25"],
        ["flexrand (split 0.25)", "social_sciences", "1", "70.00", "72.64", "-2.64"],
        ["flexrand (split 0.25)", "stem", "1", "60.00", "52.74", "+7.26"],
        ["flexrand (split 0.25)", "other", "1", "70.20", "70.20", "+0.00"],
    ]
    only_random = lines(mmlu_beside_paper(measured[:2], *source))
    assert only_random[4] == ["flexrand", "humanities", "", "", "54.75", ""]
    assert mmlu_beside_paper(measured, source[0], "demo:tiny-llama") == ""
    assert mmlu_beside_paper(measured, "jsonl:train.jsonl", source[1]) == ""
    assert mmlu_beside_paper([measured[0], measured[3]], *source) == ""


@pytest.mark.parametrize("name", ["alpaca_cleaned", "dolly_hhrlhf"])
@pytest.mark.parametrize("model", presets.LANGUAGE_MODELS)
def test_configurations_of_instructions_are_known(name, model):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](model)
    measured = [(Result("random", 0.5, None, 1, 50.0), groups(1, 2, 3, 4))]
    text = mmlu_beside_paper(measured, config.dataset.train, config.encoder.weights)
    theirs = [row for row in read_paper(PaperMmlu) if row[:2] == (name, model)]
    assert len(theirs) == 4
    np.testing.assert_allclose([float(row[4]) for row in lines(text)[:4]], [r[3] for r in theirs])
