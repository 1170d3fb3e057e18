"""Selections without images: positions, ids, a line of JSON per sample, and a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.exports.part import Part
from dlc_jax.types import Dataset
from dlc_jax.workspace import artefacts

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def write_positions(part: Part, path: Path) -> None:
    """Writes positions in the scored order, int64, ascending."""
    with artefacts.atomic(path) as file:
        np.save(file, part.rows)


def write_ids(part: Part, path: Path) -> None:
    """Writes an id per line, UTF-8."""
    check_ids_are_lines(part.samples, str(path))
    with artefacts.atomic(path) as file:
        file.writelines(f"{name}\n".encode() for name in part.samples.ids.tolist())


def check_ids_are_lines(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming it, for an id that is empty or holds a line break of any kind."""
    broken = [name for name in samples.ids.tolist() if name.splitlines() != [name]]
    if broken:
        raise checks.InputError(
            f"{where}: id {broken[0]!r} is not one line of text; use form jsonl."
        )


def write_jsonl(part: Part, path: Path) -> None:
    """Writes id, label, class_name and position in the scored order of every sample."""
    samples = part.samples
    with artefacts.atomic(path) as file:
        for name, label, position in zip(
            samples.ids.tolist(), samples.labels.tolist(), part.rows.tolist(), strict=True
        ):
            line = {"id": name, "label": label, "class_name": samples.class_names[label]}
            file.write(json_line({**line, "position": position}))


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Returns strict JSON on a line, also for readers to whom U+0085 and U+2028 end one."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    return f"{text.translate(_LINE_ENDS)}\n".encode()


def write_manifest(part: Part, path: Path) -> None:
    """Writes ids, samples per class, and how they were selected (nulls where that is not known)."""
    settings = (
        *("method", "keep_fraction", "split", "seed", "mode"),
        *("min_per_class", "variant", "allocation", "per_class"),
    )
    chosen = getattr(part.selection, "chosen", None)
    sizes = np.bincount(part.samples.labels, minlength=part.samples.num_classes)
    artefacts.write_json(
        path,
        {
            "dataset": part.samples.name,
            "part": part.name,
            **{name: getattr(part.selection, name, None) for name in settings},
            "chosen": None if chosen is None else chosen._asdict(),
            "num_samples": len(part.samples),
            "num_per_class": dict(zip(part.samples.class_names, sizes.tolist(), strict=True)),
            "ids": part.samples.ids.tolist(),
        },
    )
