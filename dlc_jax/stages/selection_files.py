"""Selections on disk: kept positions, their manifests, and what is done with superseded ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.files import array_files
from dlc_jax.files.json_files import SHA256, read_json
from dlc_jax.selection import Cell
from dlc_jax.types import Choice, Selection, labels_fingerprint
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts
from dlc_jax.workspace.artefacts import ScoredSamples

_WORD = re.compile(r"[\w.+-]{1,40}")
CELL = {"method": str, "keep_fraction": float, "split": (float, str, None), "seed": int}
_IDS = {"count": int, "sha256": SHA256}
CHOICE = {"keep_fraction": float, "method": str, "split": (float, None), "why": str}
_MANIFEST = CELL | {
    "version?": _WORD,
    "mode": _WORD,
    "chosen": (CHOICE, None),
    "num_samples": int,
    "kept": _IDS,
    "dropped": _IDS,
    "how": dict,
    "scores_fingerprint": SHA256,
}


def write_selection(
    workdir: Path, selection: Selection, samples: ScoredSamples, facts: Mapping[str, Any]
) -> list[Path]:
    """Writes kept positions and their manifest.

    Args:
      workdir: Where `selections/` is.
      selection: What to write.
      samples: What it was selected from.
      facts: What the manifest also says: `how` it was selected, `scores_fingerprint`.
    Returns:
      Both paths, below the work directory.
    """
    cell = Cell(selection.method, selection.keep_fraction, selection.split, selection.seed)
    paths = files_of(cell)
    kept = np.zeros(len(samples.ids), bool)
    kept[selection.indices] = True
    sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
    manifest = {
        **cell._asdict(),
        "version": __version__,
        "mode": selection.mode,
        "chosen": None if selection.chosen is None else selection.chosen._asdict(),
        "num_samples": len(kept),
        "kept": _ids_summary(samples, kept),
        "dropped": _ids_summary(samples, ~kept),
        "per_class": {
            name: {"samples": int(size), "kept": int(num)}
            for name, size, num in zip(
                samples.class_names, sizes, selection.num_kept_per_class, strict=True
            )
        },
        "single_sample_classes": [samples.class_names[j] for j in selection.single_sample_classes],
        **facts,
    }
    with artefacts.atomic(workdir / paths[0]) as file:
        np.save(file, selection.indices)
    artefacts.write_json(workdir / paths[1], manifest)
    return paths


def files_of(cell: Cell) -> list[Path]:
    """Returns the files of a cell, kept positions and manifest, below the work directory."""
    return [Path("selections") / f"{cell.name}{suffix}" for suffix in (".npy", ".json")]


def read_selection(
    workdir: Path,
    samples: ScoredSamples,
    cell: Cell,
    *,
    how: Mapping[str, Any],
    scores_fingerprint: str,
    mode: str,
) -> Selection:
    """Reads what `write_selection` wrote, with the ids of the kept samples.

    Args:
      workdir, samples: As for `write_selection`.
      cell: Which.
      how: What decides a selection of the method besides its cell; see `SelectionConfig.how`.
      scores_fingerprint: Fingerprint of what the method uses, as it is now.
      mode: `default` or `official`.
    Raises:
      ValueError: it is not there, is of another cell, was made by another version, from other
        scores, in another mode or another way, or is not what its manifest says.
    """
    path, described = (workdir / file for file in files_of(cell))
    manifest = read_json(described, _MANIFEST)
    if not path.exists() or not manifest:
        raise checks.InputError(f"{path}: not there; run the stage 'select' for it first.")
    if cell_of(manifest) != cell:
        raise checks.InputError(
            f"{described}: is of {cell_of(manifest).name}, expected {cell.name}. "
            "Run the stage 'select' again."
        )
    here: dict[str, Any] = {"scores_fingerprint": scores_fingerprint, "mode": mode}
    here |= {"version": __version__, "num_samples": len(samples.ids)}
    found = {**{name: manifest.get(name) for name in here}, **manifest["how"]}
    for name, value in {**here, **how}.items():
        if found.get(name) != value:
            raise checks.InputError(
                f"{path}: selected with {name} {_short(found.get(name))}, expected "
                f"{_short(value)}. Run the stage 'select' again."
            )
    indices = array_files.read_npy(path)
    checks.positions(str(path), indices, len(samples.ids))
    kept = np.zeros(len(samples.ids), bool)
    kept[indices] = True
    for part, some in (("kept", kept), ("dropped", ~kept)):
        if _ids_summary(samples, some) != manifest[part]:
            raise checks.InputError(
                f"{path}: its {len(indices)} positions are not the {manifest['kept']['count']} "
                "that its manifest was written for. Run the stage 'select' again."
            )
    indices, chosen = np.flatnonzero(kept), manifest["chosen"]
    return Selection(
        indices=indices,
        **cell._asdict(),
        mode=mode,
        **{name: value for name, value in how.items() if name not in ("score", "tuning")},
        chosen=None if chosen is None else choice_of(chosen),
        num_kept_per_class=np.bincount(samples.labels[indices], minlength=len(samples.class_names)),
        labels_fingerprint=labels_fingerprint(samples.labels),
        ids=samples.ids[indices],
    )


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


def _short(value: Any) -> str:
    return repr(value)[:14]


def set_superseded_aside(
    workdir: Path,
    fingerprints: Mapping[str, str],
    mode: str,
    how_of: Callable[[Cell], Mapping[str, Any]],
) -> int:
    """Moves selections of other scores, made another way or in another mode to `superseded/`.

    Args:
      workdir: Where `selections/` is.
      fingerprints: Fingerprint of what each method uses, by method.
      mode: `default` or `official`.
      how_of: What decides a selection besides.
    Returns:
      How many were moved.
    """
    moved = 0
    for manifest in sorted(workdir.glob("selections/*/*.json")):
        facts = read_json(manifest, _MANIFEST)
        made_from, version = facts["scores_fingerprint"], facts.get("version")
        expected = fingerprints.get(manifest.parent.name)
        folder = f"{made_from[:12]}-{facts['mode']}"
        if version != __version__:
            folder += f"-{version}"
        elif (made_from, facts["mode"]) == (expected, mode):
            how, cell = facts["how"], cell_of(facts)
            if manifest == workdir / files_of(cell)[1] and how == how_of(cell):
                continue
            folder += f"-{artefacts.json_hash(how)[:6]}"
        target = workdir / "superseded" / folder / manifest.parent.name
        for path in (manifest.with_suffix(".npy"), manifest):
            if path.exists():
                artefacts.move(path, target / path.name)
        moved += 1
    return moved
