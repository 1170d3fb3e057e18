"""What a fine-tuning run keeps in its folder, and what a finished one leaves there."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlc_jax.checks.escaping import csv_cell, visible
from dlc_jax.files.json_files import parse_json
from dlc_jax.types import RunResult
from dlc_jax.workspace import artefacts
from dlc_jax.workspace.checkpoints import Checkpoints

METRICS = "metrics.jsonl"
PER_CLASS = "per_class_accuracy.csv"
CHECKPOINT = "checkpoint"
STOPPED = "stopped"  # of a run that was stopped where it keeps no checkpoint by itself
ADAPTER, MERGED = "adapter", "merged"
SEEN = "seen"  # what a watch keeps of every epoch
ERROR = "error.txt"


class RunFolder(NamedTuple):
    """The folder of one run: metrics.jsonl, per_class_accuracy.csv, checkpoint/.

    Attributes:
      path: The folder.
      identity: Hash of what decides the run; checkpoints of another run are not restored.
      say: Takes a line for each checkpoint that is damaged.
    """

    path: Path
    identity: str
    say: Callable[[str], None] = print

    def checkpoints(self, name: str = CHECKPOINT) -> Checkpoints:
        """Opens the checkpoints of the run."""
        return Checkpoints(self.path / name, self.identity, self.path / SEEN, self.say)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl`, one line per epoch; numbers that are not finite as null."""
    with artefacts.atomic(folder / METRICS, "w") as file:
        for epoch in history:
            file.write(f"{json.dumps(artefacts.finite(epoch), allow_nan=False)}\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns what `write_metrics` wrote, null as NaN."""
    path = folder / METRICS
    lines = [parse_json(line, dict, path) for line in path.read_text().splitlines()]
    return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]


def write_per_class(
    folder: Path, result: RunResult, class_names: Iterable[str], num_test: np.ndarray | None
) -> None:
    """Writes `per_class_accuracy.csv`.

    Args:
      folder: Folder of the run.
      result: Accuracies, in percent.
      class_names: Names of the c classes.
      num_test: [c] test samples of each class; None without a test set.
    """
    with artefacts.atomic(folder / PER_CLASS, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("label", "class_name", "num_test", "test_accuracy"))
        for label, name in enumerate(class_names):
            number = 0 if num_test is None else int(num_test[label])
            tested = result.per_class_accuracy if number else None
            accuracy = "" if tested is None else repr(float(tested[label]))
            table.writerow((label, csv_cell(visible(name)), number, accuracy))
