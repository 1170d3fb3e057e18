"""Work on all cores, a few results ahead of who takes them, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def in_order(
    compute: Callable[[int], Result], num: int, *, num_ahead: int | None = None
) -> Iterator[Result]:
    """Yields `compute(0)`, `compute(1)`, ... `compute(num - 1)`, computed on all cores.

    Args:
      compute: Must not depend on the order of its calls.
      num: How many.
      num_ahead: Most results that wait to be taken; None: eight per core.
    """
    import grain  # a quarter of the package's import time, and only reading images needs it

    num_threads = (os.cpu_count() or 1) + 1  # one more, for when one waits for the disk
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_ahead or 8 * num_threads
    )
    yield from grain.MapDataset.range(num).map(compute).to_iter_dataset(options)
