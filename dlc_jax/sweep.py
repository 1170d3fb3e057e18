"""The stage `finetune`: a run for every selected cell and for the full set, sharing programs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dlc_jax import artefacts, checks, provenance
from dlc_jax.config import Config
from dlc_jax.encoders import Encoder
from dlc_jax.selection import Cell, kept_positions
from dlc_jax.selection_inputs import SelectionInputs
from dlc_jax.training import ERROR, Finetuner, RunFolder
from dlc_jax.types import Dataset, Selection

FULL = "full"
COLUMNS = ("method", "keep_fraction", "split", "seed", "num_kept", "test_accuracy", "seconds")


def cells_of(config: Config) -> list[Cell]:
    """Returns the runs of a sweep, the full set, at keep fraction 1, first."""
    full = [Cell(FULL, 1.0, None, seed) for seed in config.selection.seeds]
    return (full if config.finetune.full_set else []) + config.selection.cells()


class SweepEnd(NamedTuple):
    """How a sweep ended.

    Attributes:
      failures: A line for every run that failed; the others are not touched by it.
      seconds: Time of all finished runs, whenever they ran.
    """

    failures: list[str]
    seconds: float


def run_sweep(
    config: Config,
    workdir: Path,
    known: SelectionInputs,
    encoder: Encoder,
    dataset: Dataset,
    test: Dataset,
    echo: Callable[[str], None],
) -> SweepEnd:
    """Runs what is not finished yet, and rewrites `results.csv` after every run.

    Args:
      config: Checked configuration.
      workdir: Where scores and selections are.
      known: What was scored, and what the methods go by.
      encoder: What to fine-tune, before `mode` decides anything.
      dataset: What to train on.
      test: What to test on.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        with unknown classes, a work directory that is in use; or every run failed.
    """
    provenance.check_is_what_was_scored(workdir, dataset)
    with artefacts.locked(workdir / artefacts.FINETUNE):
        finetuner = Finetuner(
            encoder,
            dataset,
            test,
            config.finetune,
            image_size=config.encoder.image_size,
            mode=config.mode,
            on_corrupt=config.dataset.on_corrupt,
            cache=config.cache,
            progress=True,
        )
        sweep = _Sweep(config, workdir, known, dataset, finetuner)
        sweep.make_room(echo)
        write_results(workdir)  # a table of runs set aside would be taken for this sweep's
        cells = cells_of(config)
        echo(f"finetune: {len(cells)} runs on {jax.default_backend()}, test set {test.name}")
        _tell_of_the_test_set(dataset, test, finetuner, echo)
        failures = sweep.run_all(cells, echo)
    if len(failures) == len(cells):
        raise checks.InputError(f"all {len(cells)} runs failed, first {failures[0]}")
    return SweepEnd(failures, sum(row["seconds"] for row in write_results(workdir)))


class _Sweep(NamedTuple):
    """What the runs of a sweep share."""

    config: Config
    workdir: Path
    known: SelectionInputs
    dataset: Dataset
    finetuner: Finetuner

    @property
    def shared(self) -> str:
        """SHA-256 of all that its runs have in common."""
        return artefacts.json_hash([self.finetuner.fingerprint, self.known.samples.fingerprint])

    def folder(self, cell: Cell) -> RunFolder:
        """Returns where the run is kept."""
        return RunFolder(self.workdir / artefacts.FINETUNE / cell.name)

    def run_all(self, cells: list[Cell], echo: Callable[[str], None]) -> list[str]:
        """Runs one after the other; returns a line for every one that failed."""
        failures, num_done = [], 0
        for number, cell in enumerate(cells, start=1):
            place = f"finetune: {number}/{len(cells)} {cell.name}"
            try:
                said = self.run(cell)
                if said is not None:
                    write_results(self.workdir)
            except Exception as error:  # whatever it is, the other runs go on
                reason = _reason(error, self.folder(cell))
                failures.append(f"{cell.name}: {reason}")
                echo(f"{place}: failed: {reason}")
                continue
            if said is None:
                num_done += 1
            else:
                echo(f"{place}: {said}")
        if num_done:
            echo(f"finetune: {num_done} runs were finished before, not run again")
        return failures

    def run(self, cell: Cell) -> str | None:
        """Returns what to say of the run; None if it was finished before."""
        folder = self.folder(cell)
        positions = kept_positions(self.dataset, self._kept(cell))
        inputs = self.finetuner.inputs(positions, cell.seed)
        if folder.is_finished(inputs):
            if not self.config.finetune.keep_weights:
                folder.drop_weights()  # a kill may have come between result and deletion
            return None
        found = folder.facts().get("inputs", inputs)
        if found != inputs:
            _move_over(folder.path, _aside(self.workdir, found))
        settings = dataclasses.asdict(self.config.finetune)
        facts = {"shared": self.shared, "cell": cell._asdict(), "settings": settings}
        result = self.finetuner.run(positions, cell.seed, folder, facts)
        absent = result.absent_classes
        return (
            f"test accuracy {result.test_accuracy:.2f} %, {result.num_kept} samples, "
            f"{result.seconds:.1f} s" + (f", no sample of {', '.join(absent)}" if absent else "")
        )

    def _kept(self, cell: Cell) -> Selection:
        samples, mode = self.known.samples, self.config.mode
        if cell.method != FULL:
            return self.known.read(cell)
        return Selection(
            indices=np.arange(len(samples.ids)),
            **cell._asdict(),
            mode=mode,
            num_kept_per_class=np.bincount(samples.labels, minlength=len(samples.class_names)),
            ids=samples.ids,
        )

    def make_room(self, echo: Callable[[str], None]) -> None:
        """Moves runs of other settings or scores to `superseded/`, and those of these back."""
        shared, num_moved = self.shared, 0
        for path in sorted((self.workdir / artefacts.FINETUNE).glob("*/*")):
            found = _facts(path).get("shared", shared)
            if found != shared:
                _move_over(path, _aside(self.workdir, found))
                num_moved += 1
        if num_moved:
            echo(f"finetune: {num_moved} runs of other settings or scores moved to superseded/")
        for path in sorted(_aside(self.workdir, shared).glob("*/*")):
            if not (self.workdir / artefacts.FINETUNE / path.parent.name / path.name).exists():
                _move_over(path, self.workdir / artefacts.FINETUNE)


def _tell_of_the_test_set(
    dataset: Dataset, test: Dataset, finetuner: Finetuner, echo: Callable[[str], None]
) -> None:
    untested = np.setdiff1d(dataset.class_names, np.array(test.class_names)[test.labels])
    if len(untested):
        echo(f"finetune: note: no test image of {', '.join(untested)}")
    if finetuner.skipped_test:
        echo(f"finetune: unreadable test samples left out: {len(finetuner.skipped_test)}")


def _reason(error: Exception, folder: RunFolder) -> str:
    if isinstance(error, (checks.InputError, OSError)):
        return str(error)
    reason = checks.first_line(error)
    with contextlib.suppress(OSError):  # a full disk must not end the sweep
        with artefacts.atomic(folder.path / ERROR, "w") as file:
            file.writelines(traceback.format_exception(error))
        reason += f" (all of it in {folder.path / ERROR})"
    return reason


def _facts(path: Path) -> dict[str, Any]:
    """What `run.json` says; nothing if it cannot be read, which its own run has to tell."""
    with contextlib.suppress(checks.InputError, OSError):
        return RunFolder(path).facts()
    return {}


def _aside(workdir: Path, name: str) -> Path:
    return workdir / "superseded" / f"{artefacts.FINETUNE}-{name[:12]}"


def _move_over(run: Path, to: Path) -> None:
    """Moves a run; an older one of the same settings and cell makes place."""
    target = to / run.parent.name / run.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(run, target)


def what_is_finished(config: Config, workdir: Path) -> str:
    """Returns how much of a sweep `results.csv` holds, and how its runs were trained."""
    folders = [RunFolder(path) for path in (workdir / artefacts.FINETUNE).glob("*/*")]
    known = {f"{f.path.parent.name}/{f.path.name}": _facts(f.path) for f in folders}
    finished = {name for name, facts in known.items() if "result" in facts}
    asked = {cell.name for cell in cells_of(config)}
    said = f"{len(asked & finished)} of the {len(asked)} runs asked for are finished"
    if others := len(finished - asked):
        said += f"; {others} others are in the table as well"
    settings = next((known[name].get("settings") for name in sorted(finished)), None)
    if settings is None:
        return f"{said}."
    shown = ("epochs", "batch_size", "learning_rate", "linear_probe", "dtype")
    said += ". Trained with " + ", ".join(f"{key} {settings[key]}" for key in shown)
    mine = dataclasses.asdict(config.finetune)
    if differ := [key for key in shown if settings[key] != mine[key]]:
        said += f" (the configuration says {', '.join(f'{key} {mine[key]}' for key in differ)})"
    return f"{said}."


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes `results.csv` from every finished run in the work directory, in a fixed order."""
    rows = []
    for path in (workdir / artefacts.FINETUNE).glob("*/*"):
        facts = _facts(path)
        if "result" in facts and "cell" in facts:
            rows.append({**facts["cell"], **facts["result"]})
    rows.sort(
        key=lambda row: (
            row["method"] != FULL,
            row["method"] != "random",
            row["method"],
            row["keep_fraction"],
            str(row["split"] or ""),
            row["seed"],
        )
    )
    with artefacts.atomic(workdir / artefacts.RESULTS, "w") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return rows
