"""The stage `tune`: what `auto` stands for, and how much can be dropped, below `tuning/`."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import reports
from dlc_jax.checks.escaping import csv_cell
from dlc_jax.config import Config
from dlc_jax.distributed import Run, make_mesh
from dlc_jax.stages.score import Load, load_configured
from dlc_jax.stages.selection_files import CHOICE, choice_of
from dlc_jax.stages.what_was_scored import check_is_what_was_scored
from dlc_jax.tuning import FinetuneTrials, keep_curve, tune
from dlc_jax.types import Gap, Tried, Tuning
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts, provenance
from dlc_jax.workspace.artefacts import ScoredSamples

_FILE = f"{artefacts.TUNING}/tuning.json"
_TABLE = f"{artefacts.TUNING}/tuning.csv"
_REPORT = f"{artefacts.TUNING}/tuning.md"
_FIGURE = f"{artefacts.TUNING}/curve.png"
_TRIALS = f"{artefacts.TUNING}/trials"
_GAPS = ("to_random", "to_full", "to_even")
_TRIED = {"keep_fraction": float, "method": str, "split": (float, None), "accuracy": float}
_GAP = [float, float, float]
_TRIED |= {"to_random": _GAP, "to_full": _GAP, "to_even": (_GAP, None)}
_TUNING = {
    "tried": [_TRIED],
    "methods": [CHOICE],
    "splits": [CHOICE],
    "full_accuracy": float,
    "trained": str,
    "num_repeats": int,
    "min_per_class": int,
    "scores_fingerprint": str,
    "features_fingerprint": (str, None),
    "seconds": float,
}


def run_tune(
    config: Config, workdir: Path, samples: ScoredSamples, load: Load, echo: Callable[[str], None]
) -> Tuning:
    """Tunes on held-out parts of the training data, or reads the results of an earlier run.

    The test set is not loaded here. Writes tuning.json (all of it), tuning.csv (a row per way of
    choosing), tuning.md (choices, and the smallest keep fraction that will do) and curve.png.

    Raises:
      ValueError: features that are not there, data that were not scored; see also `tune`.
    """
    score = config.selection.score_of("flexrand")
    arrays = {score: samples.score(score)}
    if config.tuning.needs_features:
        provenance.check_is_whole(workdir, "features")
        arrays["features"] = artefacts.read_array(workdir, artefacts.FEATURES, "features", samples)
    trials = _finetune_trials(config, workdir, samples, load)
    made_with = config.decides_auto | {"keep_fractions": config.selection.keep_fractions}
    trained = None if trials is None else trials.fingerprint
    inputs = artefacts.json_hash(
        [__version__, config.decides_auto, samples.fingerprint_of(arrays), trained]
    )
    if provenance.is_done(workdir, "tune", inputs) and _covers(workdir, config):
        echo("tune: unchanged, not run again")
        tuning = read_tuning(workdir)
    else:
        echo(f"tune: by {config.tuning.by}, {config.tuning.num_repeats} held-out fifths")
        tuning = tune(
            arrays[score],
            samples.labels,
            ids=samples.ids,
            features=arrays.get("features"),
            trials=trials or config.linear_probe,
            keep_fractions=config.selection.keep_fractions,
            methods=config.tuning.methods,
            splits=config.tuning.splits,
            num_repeats=config.tuning.num_repeats,
            min_per_class=config.selection.min_per_class,
            seed=config.seed,
            run=Run(mesh=make_mesh(devices=jax.local_devices()), progress=True),
        )
        if trials is not None:
            seconds = tuning.seconds + trials.earlier_seconds
            tuning = dataclasses.replace(tuning, seconds=seconds)
        _write(workdir, tuning)
        paths = [Path(name) for name in (_FILE, _TABLE, _FIGURE)]
        provenance.record(workdir, "tune", inputs, paths, tuning.seconds, {}, made_with)
        artefacts.remove(workdir / _TRIALS)  # finished
    curve = keep_curve(tuning, tolerance=config.tuning.tolerance)
    table = reports.tuning_table(tuning, curve)
    with artefacts.atomic(workdir / _REPORT, "w") as file:
        file.write(f"{table}\n")
    echo(f"\n{table}\n")
    echo(f"files: {workdir}/{artefacts.TUNING}/ (tuning.md, tuning.csv, curve.png)")
    return tuning


def read_tuning(workdir: Path) -> Tuning:
    """Reads `tuning/tuning.json`; ValueError where it is damaged."""
    return _from_json(artefacts.read_json(workdir / _FILE, _TUNING))


def _covers(workdir: Path, config: Config) -> bool:
    """Whether every keep fraction was tuned; each is tuned as if there were no others."""
    known = provenance.settings_of(workdir, "tune", {"keep_fractions": [float]})
    assert known is not None  # the stage ran
    return set(config.selection.keep_fractions) <= set(known["keep_fractions"])


def _finetune_trials(
    config: Config, workdir: Path, samples: ScoredSamples, load: Load
) -> FinetuneTrials | None:
    """Returns what fine-tunes; None where linear heads are trained instead."""
    if config.tuning.by == "linear_probe":
        return None
    dataset = load(config.dataset.train)
    check_is_what_was_scored(workdir, dataset)
    scored = np.flatnonzero(np.isin(dataset.ids, samples.ids))  # others could not be read
    return FinetuneTrials(
        load_configured(config),
        config.images(dataset.subset(scored)),
        config.finetune,
        mode=config.mode,
        run=Run(workdir / _TRIALS, make_mesh(devices=jax.local_devices())),
    )


def _write(workdir: Path, tuning: Tuning) -> None:
    with artefacts.atomic(workdir / _TABLE, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        gaps = [f"{name}{part}" for name in _GAPS for part in ("", "_half_width", "_p_value")]
        table.writerow(["keep_fraction", "method", "split", "accuracy", *gaps])
        for row in tuning.tried:
            numbers = [gap for name in _GAPS for gap in getattr(row, name) or ("", "", "")]
            cells = [row.keep_fraction, csv_cell(row.method), row.split, row.accuracy, *numbers]
            table.writerow(cells)
    with artefacts.atomic(workdir / _FIGURE) as file:
        reports.tuning_figure(tuning).savefig(file, format="png", dpi=150)
    artefacts.write_json(workdir / _FILE, _to_json(tuning))


def _to_json(tuning: Tuning) -> dict[str, Any]:
    values = {name: getattr(tuning, name) for name in Tuning.__dataclass_fields__}
    for name in ("methods", "splits", "tried"):
        values[name] = [row._asdict() for row in values[name]]
    return values


def _from_json(values: dict[str, Any]) -> Tuning:
    def tried(row: dict[str, Any]) -> Tried:
        gaps = {name: None if row[name] is None else Gap(*row[name]) for name in _GAPS}
        return Tried(*((row | gaps)[name] for name in Tried._fields))

    fields = {name: values[name] for name in _TUNING}
    fields |= {name: tuple(map(choice_of, values[name])) for name in ("methods", "splits")}
    return Tuning(**fields | {"tried": tuple(map(tried, values["tried"]))})
