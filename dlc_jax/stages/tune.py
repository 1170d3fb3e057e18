"""The stage `tune`: what `auto` stands for, and how much can be dropped, below `tuning/`."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from dlc_jax import expect, reports
from dlc_jax.distributed import Run, make_mesh
from dlc_jax.stages.select import CHOICE, Job, choice_of
from dlc_jax.tasks.task import TunedTask
from dlc_jax.tuning import FinetuneTrials, keep_curve, tune
from dlc_jax.types import Gap, Tried, Tuning
from dlc_jax.workspace import Record, Written, artefacts, records

_FILE = f"{artefacts.TUNING}/tuning.json"
_TABLE = f"{artefacts.TUNING}/tuning.csv"
_FIGURE = f"{artefacts.TUNING}/curve.png"
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


def run(job: Job) -> None:
    """Finds `job.scored.tuning`.

    Tunes on held-out parts of the training data, or reads the results of an earlier run.

    The test set is not loaded here. Writes tuning.json (all of it), tuning.csv (a row per way of
    choosing), tuning.md (choices, and the smallest keep fraction that will do) and curve.png.

    Raises:
      ValueError: features that are not there, data that were not scored; see also `tune`.
    """
    config, (root, say), inputs = job.config, job.workspace, job.scored
    score = config.selection.score_of("flexrand")
    arrays = {score: inputs.samples.score(score)}
    if config.tuning.needs_features:
        arrays["features"] = inputs.input("features")
    trials = None
    if config.tuning.by == "finetune":
        trials = cast(TunedTask, job.task).trials(job.workspace, inputs.samples.ids)
    step = TuningStep(job, arrays, trials, config.selection.keep_fractions)
    step = step.covered_by(records.read(root, step.name))
    if not job.workspace.ensure(step):
        say("tune: unchanged, not run again")
    inputs.tuning = step.read(root)
    curve = keep_curve(inputs.tuning, tolerance=config.tuning.tolerance)
    table = reports.tuning_table(inputs.tuning, curve)
    job.workspace.write_text(f"{artefacts.TUNING}/tuning.md", f"{table}\n")
    say(f"\n{table}\n")
    say(f"files: {root}/{artefacts.TUNING}/ (tuning.md, tuning.csv, curve.png)")


@dataclasses.dataclass(frozen=True, eq=False)
class TuningStep:
    """Accuracies on held-out parts of the training data, by way of choosing, `tuning/`.

    Attributes:
      arrays: Score that hardness is measured by, [n], and features, [n, d], where they are used.
      trials: Fine-tuning of held-out parts; None: linear heads.
      keep_fractions: Keep fractions to tune, together.
    """

    job: Job
    arrays: dict[str, np.ndarray]
    trials: FinetuneTrials | None
    keep_fractions: tuple[float, ...]

    name = stage = "tune"
    kind = "tuning"
    files = (_FILE, _TABLE, _FIGURE)
    # what fine-tuning on subsets has so far, and its records
    obsolete = (f"{artefacts.TUNING}/trials", f"{artefacts.TUNING}/{records.FOLDER}")

    @property
    def key(self) -> dict[str, Any]:
        return {
            "decides_auto": self.job.config.decides_auto,
            "scores": self.job.scored.samples.fingerprint_of(self.arrays),
            "trained": None if self.trials is None else self.trials.fingerprint,
            "keep_fractions": self.keep_fractions,
        }

    @property
    def settings(self) -> dict[str, Any]:
        return self.job.config.decides_auto | {"keep_fractions": self.keep_fractions}

    def covered_by(self, known: Record | None) -> TuningStep:
        """Returns the step of a tuning that has these keep fractions and more, or this step."""
        theirs = None if known is None else known.key.get("keep_fractions")
        if known is None or not isinstance(theirs, list):
            return self
        wider = dataclasses.replace(self, keep_fractions=tuple(theirs))
        covers = all(fraction in theirs for fraction in self.keep_fractions)
        return wider if covers and known.difference(wider) is None else self

    def compute(self, scratch: Path) -> Tuning:
        config, samples, trials = self.job.config, self.job.scored.samples, self.trials
        how = f"by {config.tuning.by}, {config.tuning.num_repeats} held-out fifths"
        self.job.workspace.say(f"tune: {how}")
        tuning = tune(
            self.arrays[config.selection.score_of("flexrand")],
            samples.labels,
            ids=samples.ids,
            features=self.arrays.get("features"),
            trials=trials or config.linear_probe,
            keep_fractions=self.keep_fractions,
            methods=config.tuning.methods,
            splits=config.tuning.splits,
            num_repeats=config.tuning.num_repeats,
            min_per_class=config.selection.min_per_class,
            seed=config.seed,
            run=Run(mesh=make_mesh(devices=jax.local_devices()), progress=True),
        )
        if trials is None:
            return tuning
        return dataclasses.replace(tuning, seconds=tuning.seconds + trials.earlier_seconds)

    def write(self, root: Path, tuning: Tuning) -> Written:
        with artefacts.atomic(root / _TABLE, "w") as file:
            table = csv.writer(file, lineterminator="\n")
            gaps = [f"{name}{part}" for name in _GAPS for part in ("", "_half_width", "_p_value")]
            table.writerow(["keep_fraction", "method", "split", "accuracy", *gaps])
            for row in tuning.tried:
                numbers = [gap for name in _GAPS for gap in getattr(row, name) or ("", "", "")]
                method = expect.csv_cell(row.method)
                table.writerow([row.keep_fraction, method, row.split, row.accuracy, *numbers])
        with artefacts.atomic(root / _FIGURE) as file:
            reports.tuning_figure(tuning).savefig(file, format="png", dpi=150)
        lists = ("methods", "splits", "tried")
        rows = {name: [row._asdict() for row in getattr(tuning, name)] for name in lists}
        artefacts.write_json(root / _FILE, vars(tuning) | rows)
        return Written(self.files, seconds=tuning.seconds)

    def read(self, root: Path) -> Tuning:
        values = artefacts.read_json(root / _FILE, _TUNING)
        fields = {name: values[name] for name in _TUNING}
        for name, read in (("methods", choice_of), ("splits", choice_of), ("tried", _tried)):
            fields[name] = tuple(map(read, values[name]))
        return Tuning(**fields)


def _tried(facts: dict[str, Any]) -> Tried:
    gaps = {name: None if facts[name] is None else Gap(*facts[name]) for name in _GAPS}
    return Tried(*((facts | gaps)[name] for name in Tried._fields))
