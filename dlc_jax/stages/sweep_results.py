"""What a sweep came to: its runs, what the stage `evaluate` measured of them, and `results.csv`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.files.json_files import NAME, check_shape
from dlc_jax.selection import FULL, Cell
from dlc_jax.stages.select import CELL, cell_of
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
# What was not fine-tuned, to compare with.
BASE_CELL = Cell("base", 0.0, None, 0)


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
