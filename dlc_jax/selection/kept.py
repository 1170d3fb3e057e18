"""From what the user says is kept to positions in the data set, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.types import Dataset, Selection, labels_fingerprint


def kept_positions(
    dataset: Dataset, kept: Selection | np.ndarray | Sequence[int] | None
) -> Int64[np.ndarray, " k"]:
    """Returns the kept positions in the data set, ascending; all of them for None.

    Raises:
      ValueError: they are empty, out of range or repeated, or the selection was made from another
        data set: from other labels or, where it knows its ids, with ids the data set has not.
    """
    if kept is None:
        return np.arange(len(dataset))
    if not isinstance(kept, Selection):
        checks.positions("kept", np.asarray(kept), len(dataset))
        return np.sort(np.asarray(kept)).astype(np.int64)
    if len(kept) == 0:
        raise checks.InputError(
            f"kept: {kept.method} at keep fraction {kept.keep_fraction:g} keeps no sample (budgets "
            "are rounded in every class); expected one or more."
        )
    if kept.ids is not None:
        checks.no_repetition("kept.ids", kept.ids)
        positions = _positions_of(dataset, kept.ids)
    else:
        positions = kept.indices
        made_from = kept.labels_fingerprint
        if made_from is not None and made_from != labels_fingerprint(dataset.labels):
            raise checks.InputError(
                f"kept: selected from other labels than those of {dataset.name} (their fingerprint "
                f"is {made_from[:12]}, not {labels_fingerprint(dataset.labels)[:12]}); expected a "
                "selection from this data set, in its order, or one made with select(..., "
                "ids=...)."
            )
        checks.positions("kept.indices", positions, len(dataset))
    num_kept = np.bincount(dataset.labels[positions], minlength=dataset.num_classes)
    expected = np.zeros_like(num_kept)
    expected[: len(kept.num_kept_per_class)] = kept.num_kept_per_class[: len(expected)]
    if not np.array_equal(num_kept, expected):
        label = int(np.flatnonzero(num_kept != expected)[0])
        raise checks.InputError(
            f"kept: {num_kept[label]} samples are of class {dataset.class_names[label]!r} in "
            f"{dataset.name}, but the selection has {expected[label]}: it was made from another "
            "data set."
        )
    return np.sort(positions)


def _positions_of(dataset: Dataset, ids: np.ndarray) -> Int64[np.ndarray, " k"]:
    places = {name: position for position, name in enumerate(dataset.ids.tolist())}
    unknown = [name for name in ids.tolist() if name not in places]
    if unknown:
        raise checks.InputError(
            f"kept: {len(unknown)} of {len(ids)} kept samples are not in {dataset.name}, first "
            f"{unknown[0]!r}: the selection was made from another data set."
        )
    return np.array([places[name] for name in ids.tolist()], np.int64)
