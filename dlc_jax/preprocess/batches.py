"""Samples in batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Shaped


def in_batches(
    items: Iterator[tuple[int, Any]], size: int
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Yields positions [k] and items, `size` at a time, the last time perhaps fewer."""
    while some := list(islice(items, size)):
        positions, values = zip(*some, strict=True)
        yield np.asarray(positions, np.int64), list(values)


def filled(rows: Shaped[np.ndarray, "k ..."], size: int) -> Shaped[np.ndarray, "b ..."]:
    """Returns `size` rows: these, and repetitions of them, so that one program fits all batches."""
    return rows if len(rows) == size else rows[np.arange(size) % len(rows)]
