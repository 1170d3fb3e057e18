"""What an export writes: kept or dropped samples of those that were scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.selection import kept_positions
from dlc_jax.selection.kept import places_of
from dlc_jax.types import Dataset, Selection, labels_fingerprint

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
    checks.one_of("export part", part, PARTS)
    rows = kept_positions(dataset, kept)
    scored: np.ndarray | None = dataset.ids
    if isinstance(kept, Selection):
        rows, scored = np.sort(kept.indices), _scored_ids(dataset, kept)
    if part == "dropped":
        if scored is None:
            raise checks.InputError(
                f"{where}: the selection does not know which samples it was made from, and so not "
                "which are dropped; expected one made with select(..., ids=...)."
            )
        rows = np.setdiff1d(np.arange(len(scored)), rows)
        if not len(rows):
            raise checks.InputError(f"{where}: nothing is dropped, so there is nothing to write.")
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
    checks.positions("kept.indices", kept.indices, len(dataset))
    in_its_order = kept.ids is None or np.array_equal(dataset.ids[kept.indices], kept.ids)
    return dataset.ids if in_its_order else None
