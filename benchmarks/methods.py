"""Which method keeps the best samples? All methods, keep fractions, seeds, by linear probe.

python -m benchmarks.methods --config=configs/demo_sweep.py --workdir=runs/methods \
    [--finetuned=runs/demo_sweep/results.csv] [--config.KEY=VALUE ...]

Scores, trains and tunes in the work directory as `dlc_jax.main` does, unless that was done, then
trains a linear head on every cell: all methods with the configuration's seeds, and `auto` and split
`auto` against random with ten. Prints accuracy per method and keep fraction, gaps to random of
`auto` with Holm-corrected tests, and with --finetuned the rank correlation with a sweep of the same
data. Writes methods.csv into the work directory. Five minutes for the sample on two cores.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from scipy import stats

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.reports import read_results
from dlc_jax.reports.results import Mean
from dlc_jax.reports.table import markdown
from dlc_jax.selection import AUTO, SELECTORS, Cell
from dlc_jax.stages import pipeline, tune
from dlc_jax.stages.select import Job, SelectionInputs
from dlc_jax.tasks import task_of
from dlc_jax.tasks.images import load_configured
from dlc_jax.training.images import class_ids_by_name
from dlc_jax.tuning import linear_probes
from dlc_jax.tuning.gaps import holm
from dlc_jax.workspace import Workspace, artefacts

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where scores are, or go.")
_FINETUNED = flags.DEFINE_string("finetuned", None, "results.csv to compare with.")
_SPLITS = (0.1, 0.3, 0.5, 0.7, 0.9)
_AUTO_SEEDS = tuple(range(10))


def main(_: list[str]) -> None:
    config, workdir = Config.of(_CONFIG.value), Path(_WORKDIR.value)
    config = dataclasses.replace(
        config,
        stages=("score", "tune"),
        selection=dataclasses.replace(
            config.selection, methods=(*SELECTORS, AUTO), splits=(*_SPLITS, AUTO)
        ),
    )
    pipeline.run(config, workdir)
    known = SelectionInputs(config, workdir, artefacts.read_scores(workdir))
    tune.run(Job(config, Workspace(workdir), task_of(config, print), known))
    cells = [cell for cell in config.selection.cells() if AUTO not in cell]
    for way in (("random", None), (AUTO, None), ("flexrand", 0.5), ("flexrand", AUTO)):
        for keep in config.selection.keep_fractions:
            cells += [Cell(way[0], keep, way[1], seed) for seed in _AUTO_SEEDS]
    cells = list(dict.fromkeys(cells))
    accuracy = dict(zip(cells, accuracies(config, known, cells), strict=True))
    with artefacts.atomic(workdir / "methods.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(("method", "keep_fraction", "split", "seed", "test_accuracy"))
        table.writerows((*cell, value) for cell, value in accuracy.items())
    print(f"\n{means(config, accuracy)}\n\n{against_random(config, accuracy)}\n")
    if _FINETUNED.value:
        print(agreement(accuracy, Path(_FINETUNED.value)))


def accuracies(config: Config, known: SelectionInputs, cells: list[Cell]) -> np.ndarray:
    """Returns the test accuracy of each cell, in percent; the full set's is printed."""
    encoder = load_configured(config)
    assert config.dataset.test is not None
    test = dlc.load_dataset(config.dataset.test)
    images = config.images(test, encoder.transform)
    kept = [known.select(cell) for cell in cells]
    found = linear_probes(
        known.input("features"),
        known.samples.labels,
        [*kept, np.arange(len(known.samples.ids))],
        seeds=[*(cell[3] for cell in cells), 0],
        val_features=dlc.features(encoder, images, mode=config.mode, compute=config.probe),
        val_labels=class_ids_by_name(test, dlc.load_dataset(config.dataset.train)),
        settings=config.linear_probe,
    )
    print(f"{len(kept)} heads in {found.seconds:.1f} s; full set {found.accuracy[-1]:.2f} %")
    return found.accuracy[:-1]


def means(config: Config, accuracy: dict[Cell, float]) -> str:
    """Returns a table of mean accuracies over the configuration's seeds."""
    seeds, keeps = config.selection.seeds, config.selection.keep_fractions
    ways = dict.fromkeys((cell[0], cell[2]) for cell in accuracy if AUTO not in cell)
    rows = [
        (
            method if split is None else f"{method} (split {split:g})",
            *(
                f"{np.mean([accuracy[method, k, split, seed] for seed in seeds]):.1f}"
                for k in keeps
            ),
        )
        for method, split in ways
    ]
    return markdown(("keep fraction", *(f"{keep:g}" for keep in keeps)), rows)


def against_random(config: Config, accuracy: dict[Cell, float]) -> str:
    """Returns gaps to random over ten seeds, with one-sided tests for being worse."""
    rows, worse = [], []
    for way in ((AUTO, None), ("flexrand", AUTO)):
        for keep in config.selection.keep_fractions:
            gaps = np.array(
                [
                    accuracy[way[0], keep, way[1], seed] - accuracy["random", keep, None, seed]
                    for seed in _AUTO_SEEDS
                ]
            )
            interval = Mean.of(gaps.tolist())
            error = stats.sem(gaps)
            if error:
                p_value = float(stats.t.cdf(gaps.mean() / error, len(gaps) - 1))
            else:  # the same gap ten times, mostly 0
                p_value = 0.0 if gaps.mean() < 0 else 1.0
            worse.append(p_value)
            name = way[0] if way[1] is None else f"{way[0]} (split {way[1]})"
            rows.append([name, f"{keep:g}", f"{interval.mean:+.2f} ± {interval.half_width:.2f}"])
    for row, p_value in zip(rows, holm(worse), strict=True):
        row.append(f"{p_value:.3f}" + (" worse" if p_value < 0.05 else ""))
    return markdown(("method", "keep", "gap to random, ten seeds", "p (worse), Holm"), rows)


def agreement(accuracy: dict[Cell, float], path: Path) -> str:
    """Returns the rank correlation of mean gaps to random with those of a fine-tuning sweep."""
    finetuned: dict[Cell, float] = {
        (row.method, row.keep_fraction, row.split, row.seed): row.test_accuracy
        for row in read_results(path)
    }
    both = [cell for cell in finetuned if cell in accuracy]
    ways = [way for way in dict.fromkeys(cell[:3] for cell in both) if way[0] != "random"]
    gaps = []
    for found in (accuracy, finetuned):
        mean = {
            way: np.mean([found[cell] for cell in both if cell[:3] == way])
            for way in dict.fromkeys(cell[:3] for cell in both)
        }
        gaps.append([mean[way] - mean["random", way[1], None] for way in ways])
    signs = np.mean(np.sign(gaps[0]) == np.sign(gaps[1]))
    correlation = stats.spearmanr(*gaps)
    return (
        f"{len(ways)} gaps to random, linear probe against fine-tuning: Spearman "
        f"{correlation.statistic:.3f}, same sign in {100 * signs:.0f} %"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
