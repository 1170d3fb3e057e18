"""The stage `finetune`: a run for every selected cell and for the full set, sharing programs."""

from __future__ import annotations

import csv
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dlc_jax import artefacts, checks
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.config import Config
from dlc_jax.datasets import load_dataset
from dlc_jax.encoders import Encoder
from dlc_jax.training import Finetuner, RunFolder, kept_positions
from dlc_jax.types import Dataset, Selection

FULL = "full"
COLUMNS = ("method", "keep_fraction", "split", "seed", "num_kept", "test_accuracy", "seconds")
_FOLDER = "finetune"


class Cell(NamedTuple):
    """One run of a sweep; the full set has keep fraction 1."""

    method: str
    keep_fraction: float
    split: float | None
    seed: int

    @property
    def name(self) -> str:
        """`<method>/<cell>`, as in `selections/` and `finetune/`."""
        return f"{self.method}/{artefacts.cell_name(self.keep_fraction, self.split, self.seed)}"


def cells_of(config: Config) -> list[Cell]:
    """Returns the runs of a sweep, the full set first."""
    full = [Cell(FULL, 1.0, None, seed) for seed in config.selection.seeds]
    selected = [Cell(*cell) for cell in config.selection.cells()]
    return (full if config.finetune.full_set else []) + selected


def run_sweep(
    config: Config,
    workdir: Path,
    samples: ScoredSamples,
    encoder: Encoder,
    echo: Callable[[str], None],
) -> list[str]:
    """Runs what is not finished yet, and rewrites `results.csv` after every run.

    Args:
      config: Checked configuration.
      workdir: Where scores and selections are.
      samples: What was scored.
      encoder: What to fine-tune, before `mode` decides anything.
      echo: Takes each line meant for the user.
    Returns:
      A line for every run that failed; the others are not touched by it.
    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        with unknown classes; or every run failed.
    """
    dataset = load_dataset(config.dataset.train)
    _check_is_what_was_scored(workdir, dataset)
    assert config.dataset.test is not None  # checked with the configuration
    test = load_dataset(config.dataset.test)
    finetuner = Finetuner(
        encoder,
        dataset,
        test,
        config.finetune,
        image_size=config.encoder.image_size,
        mode=config.mode,
        on_corrupt=config.dataset.on_corrupt,
        progress=True,
    )
    shared = artefacts.json_hash([finetuner.fingerprint, samples.fingerprint])
    _make_room(workdir, shared, echo)
    cells, failures = cells_of(config), []
    echo(f"finetune: {len(cells)} runs on {jax.default_backend()}, test set {test.name}")
    num_done = 0
    for number, cell in enumerate(cells, start=1):
        place = f"finetune: {number}/{len(cells)} {cell.name}"
        folder = RunFolder(workdir / _FOLDER / cell.name)
        try:
            positions = kept_positions(dataset, _kept(config, workdir, samples, cell))
            inputs = finetuner.inputs(positions, cell.seed)
            if folder.is_finished(inputs):
                num_done += 1
                continue
            _set_aside_unless(folder, inputs, workdir)
            result = finetuner.run(
                positions, cell.seed, folder, {"shared": shared, "cell": cell._asdict()}
            )
        except Exception as error:  # whatever it is, the other runs go on
            failures.append(f"{cell.name}: {_reason(error, folder)}")
            echo(f"{place}: failed: {_reason(error, folder)}")
            continue
        note = f", no sample of {', '.join(result.absent_classes)}" * bool(result.absent_classes)
        echo(
            f"{place}: test accuracy {result.test_accuracy:.2f} %, {result.num_kept} samples, "
            f"{result.seconds:.1f} s{note}"
        )
        write_results(workdir)
    write_results(workdir)
    if len(failures) == len(cells):
        raise checks.InputError(f"all {len(cells)} runs failed, first {failures[0]}")
    if num_done:
        echo(f"finetune: {num_done} runs were finished before, not run again")
    return failures


def _check_is_what_was_scored(workdir: Path, dataset: Dataset) -> None:
    scored = artefacts.read_json(workdir / artefacts.PROVENANCE).get("dataset", {})
    fingerprint = scored.get("fingerprint", dataset.fingerprint)
    if fingerprint != dataset.fingerprint:
        raise checks.InputError(
            f"dataset.train: {dataset.name} is not what was scored in {workdir}: its fingerprint "
            f"is {dataset.fingerprint[:12]}, expected {fingerprint[:12]} ({scored.get('source')}). "
            "Run the stages 'score' and 'select' on it, in another work directory."
        )


def _kept(config: Config, workdir: Path, samples: ScoredSamples, cell: Cell) -> Selection:
    if cell.method != FULL:
        return artefacts.read_selection(workdir, samples, **cell._asdict(), mode=config.mode)
    return Selection(
        indices=np.arange(len(samples.ids)),
        **cell._asdict(),
        mode=config.mode,
        num_kept_per_class=np.bincount(samples.labels, minlength=len(samples.class_names)),
        ids=samples.ids,
    )


def _reason(error: Exception, folder: RunFolder) -> str:
    if isinstance(error, (checks.InputError, OSError)):
        return str(error)
    with artefacts.atomic(folder.path / "error.txt", "w") as file:
        file.writelines(traceback.format_exception(error))
    return f"{checks.first_line(error)} (all of it in {folder.path}/error.txt)"


def _make_room(workdir: Path, shared: str, echo: Callable[[str], None]) -> None:
    """Moves runs of other settings or scores to `superseded/`, and those of these ones back."""
    num_moved = 0
    for path in sorted((workdir / _FOLDER).glob("*/*")):
        found = RunFolder(path).facts().get("shared", shared)
        if found != shared:
            _move(path, _aside(workdir, found))
            num_moved += 1
    if num_moved:
        echo(f"finetune: {num_moved} runs of other settings or scores moved to superseded/")
    for path in sorted(_aside(workdir, shared).glob("*/*")):
        _move(path, workdir / _FOLDER)


def _aside(workdir: Path, name: str) -> Path:
    return workdir / "superseded" / f"{_FOLDER}-{name[:12]}"


def _set_aside_unless(folder: RunFolder, inputs: str, workdir: Path) -> None:
    found = folder.facts().get("inputs", inputs)
    if found != inputs:
        _move(folder.path, _aside(workdir, found))


def _move(run: Path, to: Path) -> None:
    target = to / run.parent.name / run.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        os.replace(run, target)


def write_results(workdir: Path) -> None:
    """Writes `results.csv` from every finished run in the work directory, in a fixed order."""
    rows = []
    for path in (workdir / _FOLDER).glob("*/*"):
        facts = RunFolder(path).facts()
        if "result" in facts:
            rows.append({**facts["cell"], **facts["result"]})
    rows.sort(
        key=lambda row: (
            row["method"] != FULL,
            row["method"] != "random",
            row["method"],
            row["keep_fraction"],
            row["split"] or 0,
            row["seed"],
        )
    )
    with artefacts.atomic(workdir / artefacts.RESULTS, "w") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
