"""What a sweep came to: `results.csv`, and how much of what was asked for it holds."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.files.json_files import NAME, check_shape
from dlc_jax.selection import FULL, Cell
from dlc_jax.stages.select import CELL, cell_of
from dlc_jax.training.loop import PER_CLASS, read_metrics
from dlc_jax.workspace import Record, artefacts, records

_COLUMNS = ("method", "keep_fraction", "split", "seed", "num_kept", "test_accuracy", "seconds")
# What instructions have besides: nats per response token, and accuracies on parts of MMLU.
_MORE_COLUMNS = ("test_loss", "humanities", "social_sciences", "stem", "other")
_RESULT = {"num_kept": int, "seconds": float, "test_accuracy?": (float, None)}
_RUN = {"cell": CELL, "result?": _RESULT}
_EVALUATION = {
    "asked": str,
    "run": str,
    "cell?": CELL,
    "result": {"test_accuracy": float, NAME: float},
    "num_questions": int,
    "num_truncated": int,
}
_SHOWN = ("epochs", "batch_size", "optimiser", "rank", "learning_rate", "linear_probe", "dtype")
# What was not fine-tuned, to compare with.
BASE_CELL = Cell("base", 0.0, None, 0)


def what_is_finished(config: Config, workdir: Path) -> str:
    """Returns how much of a sweep `results.csv` holds, and how its runs were trained."""
    known, unreadable = read_runs(workdir)
    finished = {name for name, run in known.items() if records.RESULT in run.facts}
    asked = {cell.name for cell in config.runs()}
    said = f"{len(asked & finished)} of the {len(asked)} runs asked for are finished"
    if others := len(finished - asked):
        said += f"; {others} others are in the table as well"
    if unreadable:
        said += f"; left out: {'; '.join(unreadable.values()).removesuffix('.')}"
    settings = next((known[name].settings for name in sorted(finished)), None)
    if settings is None:
        return f"{said}."
    mine = dataclasses.asdict(config.training)
    shown = [key for key in _SHOWN if key in mine and key in settings]
    said += ". Trained with " + ", ".join(f"{key} {settings[key]}" for key in shown)
    if differ := [key for key in shown if settings[key] != mine[key]]:
        said += f" (the configuration says {', '.join(f'{key} {mine[key]}' for key in differ)})"
    return f"{said}."


def note_on_chance(workdir: Path) -> str:
    """Returns a line on runs that learned nothing, the full set's first; "" if there are none."""
    paths = (workdir / artefacts.FINETUNE).glob("*/*")
    full_first = sorted(paths, key=lambda path: path.parent.name != FULL)
    ends = [end for end in map(_end_of, full_first) if end is not None]
    at_chance = [end for end in ends if end]
    if not at_chance:
        return ""
    return (
        f"Note: {len(at_chance)} of {len(ends)} runs learned nothing, such as {at_chance[0]}. "
        "Raise finetune.learning_rate or finetune.epochs, or lower finetune.batch_size."
    )


def _end_of(path: Path) -> str | None:
    """Returns how a run on images ended at chance; "" if it did better.

    Chance: accuracies in the last epoch and in the test are at most three standard deviations above
    guessing. None if the run has not ended, was not trained or is unreadable, and for one class,
    which is always guessed right.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, csv.Error):
        run = records.read(path, records.RUN)
        with open(path / PER_CLASS, newline="") as file:
            tested = [int(row["num_test"]) for row in csv.DictReader(file)]
        if run is None or len(tested) < 2:
            return None
        result, share = run.facts[records.RESULT], 1 / len(tested)
        trained = float(read_metrics(path)[-1]["train_accuracy"])
        right, num_kept = float(result["test_accuracy"]), int(result["num_kept"])
        in_training, in_test = (
            100 * (share + 3 * math.sqrt(share * (1 - share) / max(number, 1)))
            for number in (num_kept, sum(tested))
        )
        if not (trained <= in_training and right <= in_test):
            return ""
        return (
            f"{path.parent.name}: {trained:.1f} % right in training and {right:.1f} % in the test, "
            f"where guessing among {len(tested)} classes gives {100 / len(tested):.1f} %"
        )
    return None


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes `results.csv` from every finished run in the work directory, in a fixed order."""
    rows: list[dict[str, Any]] = []
    base = read_evaluation(workdir, BASE_CELL)
    for run in read_runs(workdir)[0].values():
        if records.RESULT in run.facts:
            cell = cell_of(run.facts["cell"])
            row = {**run.facts[records.RESULT], **cell._asdict()}
            # accuracies of this very run, on what the base model was asked, or none beside it
            measured = read_evaluation(workdir, cell)
            if measured.get("run") == run.identity and measured.get("asked") == base.get("asked"):
                row |= measured["result"]
            rows.append(row)
    if base:
        rows.append({**BASE_CELL._asdict(), "num_kept": 0, "seconds": 0.0, **base["result"]})

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        method, keep_fraction, split, seed = (row[name] for name in Cell._fields)
        is_later = [method != name for name in (BASE_CELL.method, FULL, "random")]
        return is_later, method, keep_fraction, str(split or ""), seed

    rows.sort(key=place)
    with artefacts.atomic(workdir / artefacts.RESULTS, "w") as file:
        columns = [*_COLUMNS, *(name for name in _MORE_COLUMNS if any(name in row for row in rows))]
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({key: expect.csv_cell(value) for key, value in row.items()} for row in rows)
    return rows


def run_folder(workdir: Path, cell: Cell) -> Path:
    """Returns the folder of the run of a cell."""
    return workdir / artefacts.FINETUNE / cell.name


def read_run(workdir: Path, name: str) -> Record | None:
    """Returns the record of a run by the name of its cell; None before it has started.

    Raises:
      ValueError: it is damaged, or of another cell.
    """
    folder = workdir / artefacts.FINETUNE / name
    run, path = records.read(folder, records.RUN), folder / records.file_of(records.RUN)
    if run is not None:
        check_shape(run.facts, _RUN, path)
        _check_cell(run.facts, name, path)
    return run


def read_runs(workdir: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Returns the records of runs, and why others are unreadable, by the name of the cell."""
    runs, unreadable = {}, {}
    for path in (workdir / artefacts.FINETUNE).glob("*/*"):
        name = f"{path.parent.name}/{path.name}"
        try:
            if (run := read_run(workdir, name)) is not None:
                runs[name] = run
        except (expect.InputError, OSError) as error:
            unreadable[name] = str(error)
    return runs, unreadable


def _check_cell(facts: dict[str, Any], name: str, path: Path) -> None:
    """Raises ValueError if a file is of another cell than its place says."""
    if "cell" in facts and (found := cell_of(facts["cell"]).name) != name:
        raise expect.InputError(f"{path}: is of {found}, expected {name}. Delete it to run again.")


def read_evaluation(workdir: Path, cell: Cell) -> dict[str, Any]:
    """Returns what the stage `evaluate` measured of a run, {} if it did not.

    Raises:
      ValueError: the file is damaged, or of another cell.
    """
    path = workdir / artefacts.EVALUATE / f"{cell.name}.json"
    found: dict[str, Any] = artefacts.read_json(path, _EVALUATION)
    _check_cell(found, cell.name, path)
    return found
