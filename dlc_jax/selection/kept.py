"""From what the user says is kept to positions in the data set, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.types import Dataset, Selection, labels_fingerprint


def kept_positions(
    dataset: Dataset, kept: Selection | np.ndarray | Sequence[int] | None
) -> Int64[np.ndarray, " k"]:
    """Returns the kept positions in the data set, ascending; all of them for None.

    Raises:
      ValueError: they are empty, out of range or repeated, or the selection was made from another
        data set: from other labels or, where it knows its ids, with ids the data set has not.
    """
    positions = kept_rows(dataset.name, dataset.ids, kept, dataset.labels)
    if not isinstance(kept, Selection):
        return positions
    num_kept = np.bincount(dataset.labels[positions], minlength=dataset.num_classes)
    expected = np.zeros_like(num_kept)
    expected[: len(kept.num_kept_per_class)] = kept.num_kept_per_class[: len(expected)]
    if not np.array_equal(num_kept, expected):
        label = int(np.flatnonzero(num_kept != expected)[0])
        raise expect.InputError(
            f"kept: {num_kept[label]} samples are of class {dataset.class_names[label]!r} in "
            f"{dataset.name}, but the selection has {expected[label]}: it was made from another "
            "data set."
        )
    return positions


def kept_rows(
    name: str,
    ids: np.ndarray,
    kept: Selection | np.ndarray | Sequence[int] | None,
    labels: np.ndarray | None = None,
) -> Int64[np.ndarray, " k"]:
    """Returns the kept positions among samples that have no classes; see `kept_positions`.

    Args:
      name: What the samples are called in messages.
      ids: [n] sample ids.
      kept: A selection that knows its ids, positions, or None for all.
      labels: [n] class ids, from which a selection without ids must have been made; None: any.
    """
    if kept is None:
        return np.arange(len(ids))
    if not isinstance(kept, Selection):
        given = np.asarray(kept)
        expect.positions("kept", given, len(ids))
        return np.sort(given).astype(np.int64)
    if len(kept) == 0:
        raise expect.InputError(
            f"kept: {kept.method} at keep fraction {kept.keep_fraction:g} keeps no sample (budgets "
            "are rounded in every class); expected one or more."
        )
    if kept.ids is not None:
        expect.no_repetition("kept.ids", kept.ids)
        return np.sort(places_of(name, ids, kept.ids))
    made_from = kept.labels_fingerprint
    found = None if labels is None else labels_fingerprint(labels)
    if found and made_from and made_from != found:
        raise expect.InputError(
            f"kept: selected from other labels than those of {name} (their fingerprint is "
            f"{made_from[:12]}, not {found[:12]}); expected a selection from this data set, in "
            "its order, or one made with select(..., ids=...)."
        )
    expect.positions("kept.indices", kept.indices, len(ids))
    return np.sort(kept.indices)


def places_of(
    name: str, ids: np.ndarray, wanted: np.ndarray, part: str = "kept"
) -> Int64[np.ndarray, " k"]:
    """Returns the positions of samples by their ids, in the order asked for.

    Args:
      name: Name of the data set, for messages.
      ids: [n] sample ids of the data set.
      wanted: [k] some of them.
      part: `kept` or `dropped`, for messages.
    Raises:
      ValueError: some are not there.
    """
    places = {sample: position for position, sample in enumerate(ids.tolist())}
    unknown = [sample for sample in wanted.tolist() if sample not in places]
    if unknown:
        raise expect.InputError(
            f"kept: {len(unknown)} of {len(wanted)} {part} samples are not in {name}, first "
            f"{unknown[0]!r}: the selection was made from another data set."
        )
    return np.array([places[sample] for sample in wanted.tolist()], np.int64)
