"""Selections on disk: kept positions, and manifests that describe them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.files import array_files
from dlc_jax.files.json_files import check_shape, read_json
from dlc_jax.selection import Cell
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.types import Choice, Selection, labels_fingerprint
from dlc_jax.workspace import Workspace, Written, artefacts, keys, records
from dlc_jax.workspace.artefacts import ScoredSamples

EARLIER = "earlier_seconds"  # of measuring and tuning, which a selection waits for
CELL = {"method": str, "keep_fraction": float, "split": (float, str, None), "seed": int}
CHOICE = {"keep_fraction": float, "method": str, "split": (float, None), "why": str}
_MANIFEST = CELL | {"chosen": (CHOICE, None)}


@dataclasses.dataclass(frozen=True, eq=False)
class SelectionStep:
    """Kept positions of a cell, and their manifest, `selections/<method>/<cell>`."""

    inputs: SelectionInputs
    cell: Cell

    kind = "selection"
    stage = "select"
    obsolete = ()

    @property
    def name(self) -> str:
        return f"{artefacts.SELECTIONS}/{self.cell.name}"

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.name}.npy", f"{self.name}.json"

    @property
    def key(self) -> dict[str, Any]:
        return {
            "cell": self.cell._asdict(),
            "mode": self.inputs.mode,
            "how": self.inputs.how(self.cell),
            "scores_fingerprint": self.inputs.fingerprint(self.cell.method),
            "num_samples": len(self.inputs.samples.ids),
        }

    @property
    def settings(self) -> dict[str, Any]:
        return {"mode": self.inputs.mode, **self.inputs.how(self.cell)}

    def compute(self, scratch: Path) -> Selection:
        return self.inputs.select(self.cell)

    def write(self, root: Path, selection: Selection) -> Written:
        samples = self.inputs.samples
        kept = np.zeros(len(samples.ids), bool)
        kept[selection.indices] = True
        sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
        singles = [samples.class_names[j] for j in selection.single_sample_classes]
        per_class = zip(samples.class_names, sizes, selection.num_kept_per_class, strict=True)
        manifest = {
            **self.cell._asdict(),
            "version": keys.versions()["dlc_jax"],
            "mode": selection.mode,
            "chosen": None if selection.chosen is None else selection.chosen._asdict(),
            "num_samples": len(kept),
            "kept": _ids_summary(samples, kept),
            "dropped": _ids_summary(samples, ~kept),
            "per_class": {
                name: {"samples": int(size), "kept": int(num)} for name, size, num in per_class
            },
            "single_sample_classes": singles,
            "how": self.inputs.how(self.cell),
            "scores_fingerprint": self.inputs.fingerprint(self.cell.method),
        }
        positions, described = (root / name for name in self.files)
        with artefacts.atomic(positions) as file:
            np.save(file, selection.indices)
        artefacts.write_json(described, manifest)
        return Written(self.files, {EARLIER: round(self.inputs.earlier_seconds(self.cell), 3)})

    def read(self, root: Path) -> Selection:
        """Reads the selection, with the ids of the kept samples and of all."""
        path, described = (root / name for name in self.files)
        samples, how = self.inputs.samples, self.inputs.how(self.cell)
        chosen = read_json(described, _MANIFEST)["chosen"]
        indices = array_files.read_npy(path)
        checks.positions(str(path), indices, len(samples.ids))
        sizes = np.bincount(samples.labels[indices], minlength=len(samples.class_names))
        return Selection(
            indices=indices,
            **self.cell._asdict(),
            mode=self.inputs.mode,
            **{name: value for name, value in how.items() if name not in ("score", "tuning")},
            chosen=None if chosen is None else choice_of(chosen),
            num_kept_per_class=sizes,
            labels_fingerprint=labels_fingerprint(samples.labels),
            ids=samples.ids[indices],
            scored_ids=samples.ids,
        )


def read_selection(workspace: Workspace, inputs: SelectionInputs, cell: Cell) -> Selection:
    """Returns the selection of a cell, which the stage `select` has made.

    Raises:
      ValueError: it is not there, is of another cell, was made from other scores, in another mode
        or another way, or its files have changed since.
    """
    step = SelectionStep(inputs, cell)
    path, described = (workspace.root / name for name in step.files)
    manifest = read_json(described, _MANIFEST)
    if not path.exists() or not manifest:
        raise checks.InputError(f"{path}: not there; run the stage 'select' for it first.")
    if cell_of(manifest) != cell:
        raise checks.InputError(
            f"{described}: is of {cell_of(manifest).name}, expected {cell.name}. "
            "Run the stage 'select' again."
        )
    workspace.check(step)
    return step.read(workspace.root)


def pruning_seconds(root: Path) -> dict[str, float]:
    """Returns the time that it took to know what to keep, in seconds, by the name of the cell."""
    found = {}
    for record in records.matching(root, f"{artefacts.SELECTIONS}/*/*"):
        check_shape(record.facts, {EARLIER: float}, root / records.file_of(record.step), "facts")
        name = record.step.removeprefix(f"{artefacts.SELECTIONS}/")
        found[name] = record.seconds + record.facts[EARLIER]
    return found


def cell_of(facts: Mapping[str, Any]) -> Cell:
    """Returns the cell that a manifest, or the start of a run, is of."""
    return Cell(*(facts[name] for name in Cell._fields))


def choice_of(facts: Mapping[str, Any]) -> Choice:
    """Returns what `auto` stood for, as a manifest or a tuning has it."""
    return Choice(*(facts[name] for name in Choice._fields))


def _ids_summary(samples: ScoredSamples, some: np.ndarray) -> dict[str, Any]:
    """Count, and SHA-256 of the sorted ids joined by newlines, of the samples that [n] marks."""
    ids = samples.ids[samples.by_id[some[samples.by_id]]].tolist()
    return {"count": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}
