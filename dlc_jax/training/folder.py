"""What a fine-tuning run leaves on disk, and how it finds its way back."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import artefacts, checks
from dlc_jax.types import RunResult

METRICS = "metrics.jsonl"
PER_CLASS = "per_class_accuracy.csv"
RUN = "run.json"
CHECKPOINT, STOPPED = "checkpoint", "stopped"
ERROR = "error.txt"


class RunFolder:
    """The folder of one run: metrics.jsonl, per_class_accuracy.csv, checkpoint/ and run.json.

    `run.json` tells what the run is of from its start on, and its result once it is finished.

    Args:
      path: Of the folder.
      needed: Files that a finished run has.
    """

    def __init__(self, path: Path, needed: tuple[str, ...] = (METRICS, PER_CLASS)):
        self.path, self._needed = path, needed
        self._claimed: dict[str, Any] = {}

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def stopped(self) -> Path:
        """The checkpoint of a run that was stopped within an epoch."""
        return self.path / STOPPED

    def facts(self) -> dict[str, Any]:
        """Returns run.json, {} before the run has started."""
        return artefacts.read_json(self.path / RUN)

    def is_finished(self, inputs: str) -> bool:
        """Whether a run of these inputs ended here, and its files are there."""
        facts = self.facts()
        whole = all((self.path / name).is_file() for name in self._needed)
        return facts.get("inputs") == inputs and "result" in facts and whole

    def claim(self, inputs: str, facts: dict[str, Any]) -> None:
        """Says what this folder is of.

        Raises:
          ValueError: a run of other inputs is there.
        """
        found = self.facts().get("inputs")
        if found not in (None, inputs):
            raise checks.InputError(
                f"{self.path}: holds a run with other data, encoder, kept samples or settings "
                f"(its inputs are {found[:12]}, these are {inputs[:12]}); expected an empty "
                "folder, or the one of the same run."
            )
        self._claimed = {**self.facts(), "inputs": inputs, **facts}
        self._claimed.pop("result", None)
        try:
            artefacts.write_json(self.path / RUN, self._claimed)
        except OSError as error:
            raise checks.InputError(
                f"{self.path}: cannot be written to: {error.strerror or error}."
            ) from error

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Writes one line per epoch; numbers that are not finite as null."""
        with artefacts.atomic(self.path / METRICS, "w") as file:
            for epoch in history:
                file.write(f"{json.dumps(artefacts.finite(epoch), allow_nan=False)}\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns what `write_metrics` wrote, null as NaN."""
        lines = [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]
        return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]

    def finish(
        self,
        result: RunResult,
        class_names: tuple[str, ...],
        num_test: np.ndarray | None,
        keep_weights: bool,
    ) -> None:
        """Writes accuracies, and last of all that the run is finished."""
        self.write_metrics(result.history)
        with artefacts.atomic(self.path / PER_CLASS, "w") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("label", "class_name", "num_test", "test_accuracy"))
            for label, name in enumerate(class_names):
                number, accuracy = 0, ""
                if num_test is not None and result.per_class_accuracy is not None:
                    number = int(num_test[label])
                    accuracy = repr(float(result.per_class_accuracy[label])) if number else ""
                table.writerow((label, name, number, accuracy))
        summary = {
            "num_kept": result.num_kept,
            "test_accuracy": result.test_accuracy,
            "absent_classes": result.absent_classes,
            "skipped_test": result.skipped_test,
            "seconds": result.seconds,
        }
        self.conclude(summary, keep_weights)

    def conclude(self, summary: dict[str, Any], keep_weights: bool) -> None:
        """Writes that the run is finished, and how, once everything else is on disk."""
        artefacts.write_json(self.path / RUN, {**self._claimed, "result": summary})
        artefacts.remove(self.path / ERROR)
        artefacts.remove(self.stopped)
        if not keep_weights:
            self.drop_weights()

    def drop_weights(self) -> None:
        """Deletes the checkpoint of a finished run; killed halfway, the next call goes on."""
        artefacts.remove(self.checkpoint)
