"""Selections without images: positions, ids, and a line of JSON per sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dlc_jax import artefacts, checks
from dlc_jax.types import Dataset


def write_positions(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes positions in the whole data set, int64, ascending."""
    with artefacts.atomic(path) as file:
        np.save(file, positions)


def write_ids(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes an id per line, UTF-8."""
    broken = [name for name in samples.ids.tolist() if "\n" in name or "\r" in name]
    if broken:
        raise checks.InputError(f"{path}: id {broken[0]!r} holds a line break; use form jsonl.")
    with artefacts.atomic(path) as file:
        file.writelines(f"{name}\n".encode() for name in samples.ids.tolist())


def write_jsonl(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes id, label, class_name and position of every sample."""
    with artefacts.atomic(path) as file:
        for name, label, position in zip(
            samples.ids.tolist(), samples.labels.tolist(), positions.tolist(), strict=True
        ):
            line = {"id": name, "label": label, "class_name": samples.class_names[label]}
            text = json.dumps({**line, "position": position}, ensure_ascii=False)
            file.write(f"{text}\n".encode())
