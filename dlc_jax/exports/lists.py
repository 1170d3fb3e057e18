"""What an export writes, and selections without images: positions, ids, JSON lines, a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.selection import kept_positions, places_of
from dlc_jax.types import Dataset, Selection, labels_fingerprint
from dlc_jax.workspace import artefacts

PARTS = ("kept", "dropped")


class Part(NamedTuple):
    """The kept or the dropped samples.

    Attributes:
      name: `kept` or `dropped`.
      samples: Those samples, with all classes.
      rows: [k] positions of the samples in the scored order, ascending; that is the order of the
        data set unless samples were left out of the scores.
      selection: Selection that kept or dropped them; None where only positions were given.
    """

    name: str
    samples: Dataset
    rows: Int64[np.ndarray, " k"]
    selection: Selection | None


def part_positions(
    dataset: Dataset, kept: Selection | np.ndarray | Sequence[int], part: str, where: str
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Returns the positions of kept or dropped samples in the scored order and in the data set.

    Samples that were not scored, such as unreadable ones, are neither.

    Args:
      dataset, kept, part: See `export`.
      where: For messages.
    Raises:
      ValueError: an unknown part, `kept` that does not fit the data set, nothing is dropped, or a
        selection that does not know what was scored.
    """
    expect.one_of("export part", part, PARTS)
    rows = kept_positions(dataset, kept)
    scored: np.ndarray | None = dataset.ids
    if isinstance(kept, Selection):
        rows, scored = np.sort(kept.indices), _scored_ids(dataset, kept)
    if part == "dropped":
        if scored is None:
            raise expect.InputError(
                f"{where}: the selection does not know which samples it was made from, and so not "
                "which are dropped; expected one made with select(..., ids=...)."
            )
        rows = np.setdiff1d(np.arange(len(scored)), rows)
        if not len(rows):
            raise expect.InputError(f"{where}: nothing is dropped, so there is nothing to write.")
    if scored is dataset.ids:
        return rows, rows
    if scored is None:
        assert isinstance(kept, Selection)
        wanted = kept.ids[np.argsort(kept.indices)] if kept.ids is not None else None
        return rows, rows if wanted is None else places_of(dataset.name, dataset.ids, wanted)
    return rows, places_of(dataset.name, dataset.ids, scored[rows], part)


def _scored_ids(dataset: Dataset, kept: Selection) -> np.ndarray | None:
    """Returns the ids of what was scored, in that order; None where that cannot be known."""
    if kept.scored_ids is not None:
        return kept.scored_ids
    if kept.labels_fingerprint != labels_fingerprint(dataset.labels):
        return None
    expect.positions("kept.indices", kept.indices, len(dataset))
    in_its_order = kept.ids is None or np.array_equal(dataset.ids[kept.indices], kept.ids)
    return dataset.ids if in_its_order else None


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
        raise expect.InputError(
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
