"""What a fine-tuning run leaves on disk, and how it finds its way back."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.checks.escaping import csv_cell, visible
from dlc_jax.files.json_files import SHA256, parse_json
from dlc_jax.training.checkpoints import Checkpoints
from dlc_jax.types import RunResult
from dlc_jax.workspace import artefacts

METRICS = "metrics.jsonl"
PER_CLASS = "per_class_accuracy.csv"
RUN = artefacts.RUN
CHECKPOINT, STOPPED = "checkpoint", "stopped"
ADAPTER, MERGED = "adapter", "merged"
SEEN = "seen"  # what an observer keeps of every epoch
ERROR = "error.txt"
_SHAPE = {
    "inputs": SHA256,
    "result?": {"num_kept": int, "seconds": float, "test_accuracy?": (float, None)},
}


class RunFolder:
    """The folder of one run: metrics.jsonl, per_class_accuracy.csv, checkpoint/ and run.json.

    `run.json` has the inputs of the run from its start on, and once it is finished its result and
    the SHA-256 of every file that it wrote.

    Args:
      path: Of the folder.
      needed: Files that a finished run has.
      say: Takes a line for each file or checkpoint that is damaged.
    """

    def __init__(
        self,
        path: Path,
        needed: tuple[str, ...] = (METRICS, PER_CLASS),
        say: Callable[[str], None] = print,
    ):
        self.path, self._needed, self.say = path, needed, say
        self._claimed: dict[str, Any] = {}

    @property
    def stopped(self) -> Path:
        """The checkpoint of a run that was stopped within an epoch."""
        return self.path / STOPPED

    def checkpoints(self, name: str = CHECKPOINT) -> Checkpoints:
        """Opens the checkpoints of the run that claimed this folder."""
        inputs = self._claimed["inputs"]
        return Checkpoints(self.path / name, inputs, self.path / SEEN, self.say)

    def facts(self) -> dict[str, Any]:
        """Returns run.json, {} before the run has started; ValueError if it is damaged."""
        facts: dict[str, Any] = artefacts.read_json(self.path / RUN, _SHAPE)
        return facts

    def is_finished(self, inputs: str, with_weights: bool = True) -> bool:
        """Whether a run of these inputs ended here, and its files are as it left them.

        A run whose files are not is named, and not finished from then on.

        Args:
          inputs: Hash of what decides the run.
          with_weights: Whether its checkpoint counts; else it is about to go.
        """
        facts = self.facts()
        if facts.get("inputs") != inputs or "result" not in facts:
            return False
        if damage := self.damage(with_weights):
            self.say(f"note: {self.path}: finished, but {damage}; the run is done again")
            del facts["result"]
            artefacts.write_json(self.path / RUN, facts)
            return False
        return True

    def damage(self, with_weights: bool = True) -> str | None:
        """Returns how the files of a finished run differ from those it left; None if not at all."""
        files = self.facts().get("files")
        if not isinstance(files, dict):
            return f"{RUN} has no checksums of its files"
        # without any, the user has deleted them
        if not with_weights or not (self.path / CHECKPOINT).exists():
            files = {name: value for name, value in files.items() if not _is_weights(name)}
        missing = [name for name in self._needed if name not in files]
        if missing:
            return f"{RUN} has no checksum of {missing[0]}"
        return artefacts.difference(files, artefacts.hashes_below(self.path, [*files]))

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
        for name in ("result", "files"):
            self._claimed.pop(name, None)
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
        path = self.path / METRICS
        lines = [parse_json(line, dict, path) for line in path.read_text().splitlines()]
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
                table.writerow((label, csv_cell(visible(name)), number, accuracy))
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
        self._record({**self._claimed, "result": summary}, keep_weights)
        artefacts.remove(self.path / ERROR)
        artefacts.remove(self.stopped)
        if not keep_weights:
            artefacts.remove(self.path / CHECKPOINT)

    def record_files(self) -> None:
        """Records what was added to a finished run."""
        self._record(self.facts(), keep_weights=True)

    def drop_weights(self) -> None:
        """Deletes the checkpoint of a finished run; killed halfway, the next call goes on."""
        facts = self.facts()
        if any(_is_weights(name) for name in facts.get("files", {})):
            self._record(facts, keep_weights=False)
        artefacts.remove(self.path / CHECKPOINT)

    def _record(self, facts: dict[str, Any], keep_weights: bool) -> None:
        covered = (*self._needed, *(f"{name}/" for name in (CHECKPOINT, ADAPTER, MERGED)))
        names = [name for name in artefacts.names_below(self.path) if name.startswith(covered)]
        if not keep_weights:
            names = [name for name in names if not _is_weights(name)]
        files = artefacts.hashes_below(self.path, names)
        artefacts.write_json(self.path / RUN, {**facts, "files": files})


def _is_weights(name: str) -> bool:
    return name.startswith(f"{CHECKPOINT}/")
