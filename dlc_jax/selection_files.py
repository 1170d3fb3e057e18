"""Selections on disk: kept positions, their manifests, and what is done with superseded ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import artefacts, checks
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.selection import Cell
from dlc_jax.types import Choice, Selection, labels_fingerprint


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
    paths = [Path("selections") / f"{cell.name}{suffix}" for suffix in (".npy", ".json")]
    kept = np.zeros(len(samples.ids), bool)
    kept[selection.indices] = True
    sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
    manifest = {
        "method": selection.method,
        "keep_fraction": selection.keep_fraction,
        "split": selection.split,
        "seed": selection.seed,
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
      scores_fingerprint: Of what the method goes by, as it is now.
      mode: `default` or `official`.
    Raises:
      ValueError: it is not there, was made from other scores, in another mode or another way, or is
        not what its manifest says.
    """
    path = workdir / "selections" / f"{cell.name}.npy"
    manifest = artefacts.read_json(path.with_suffix(".json"))
    if not path.exists() or not manifest:
        raise checks.InputError(f"{path}: not there; run the stage 'select' for it first.")
    try:
        indices = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise checks.InputError(f"{path}: not an array of kept positions: {error}.") from error
    checks.positions(str(path), indices, len(samples.ids))
    expected = {"scores_fingerprint": scores_fingerprint, "mode": mode, **how}
    found = {**manifest, **manifest.get("how", {})}
    for name, value in expected.items():
        if found.get(name) != value:
            raise checks.InputError(
                f"{path}: selected with {name} {_short(found.get(name))}, expected "
                f"{_short(value)}. Run the stage 'select' again."
            )
    ids = samples.ids[indices]
    kept = np.zeros(len(samples.ids), bool)
    kept[indices] = True
    if _ids_summary(samples, kept) != manifest.get("kept"):
        raise checks.InputError(
            f"{path}: its {len(ids)} positions are not the {manifest.get('kept', {}).get('count')} "
            "that its manifest was written for. Run the stage 'select' again."
        )
    return Selection(
        indices=indices.astype(np.int64),
        **cell._asdict(),
        mode=mode,
        **{name: value for name, value in how.items() if name not in ("score", "tuning")},
        chosen=None if manifest.get("chosen") is None else Choice(**manifest["chosen"]),
        num_kept_per_class=np.bincount(samples.labels[indices], minlength=len(samples.class_names)),
        labels_fingerprint=labels_fingerprint(samples.labels),
        ids=ids,
    )


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
      fingerprints: Of what each method goes by.
      mode: `default` or `official`.
      how_of: What decides a selection besides.
    Returns:
      How many were moved.
    """
    moved = 0
    for manifest in sorted(workdir.glob("selections/*/*.json")):
        facts = artefacts.read_json(manifest)
        made_from = str(facts.get("scores_fingerprint", "unknown"))
        expected = fingerprints.get(manifest.parent.name)
        folder = f"{made_from[:12]}-{facts.get('mode')}"
        if (made_from, facts.get("mode")) == (expected, mode):
            how, cell = facts.get("how"), Cell(*(facts.get(name) for name in Cell._fields))
            if how == how_of(cell):
                continue
            folder += f"-{artefacts.json_hash(how)[:6]}"
        target = workdir / "superseded" / folder / manifest.parent.name
        for path in (manifest.with_suffix(".npy"), manifest):
            if path.exists():
                artefacts.move(path, target / path.name)
        moved += 1
    return moved
