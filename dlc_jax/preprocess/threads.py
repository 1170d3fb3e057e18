"""Work on all cores, a few results ahead of who takes them, in order."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(
    compute: Callable[[int], Result], num: int, *, num_ahead: int | None = None
) -> Iterator[Result]:
    """Yields `compute(0)`, `compute(1)`, ... `compute(num - 1)`, computed on all cores.

    Args:
      compute: Must not depend on the order of its calls.
      num: How many.
      num_ahead: Most results that are under way or wait to be taken; None: eight per thread.
    Raises:
      Exception: what the first failing call raised, when its turn has come.
    """
    num_threads = (os.cpu_count() or 1) + 1  # one more, for when one waits for the disk
    num_ahead = num_ahead or 8 * num_threads
    waiting: collections.deque[Future[Result]] = collections.deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="in_order")
    try:
        for number in range(num):
            waiting.append(pool.submit(compute, number))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
