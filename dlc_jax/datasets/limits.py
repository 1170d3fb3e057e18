"""Limits while a program that came with a model runs: its chat template can loop and grow."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_SECONDS, _BYTES = 10.0, 2**29


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends a block that takes more than 10 seconds, or 512 MiB more than the process has.

    Time is limited in the main thread, where signals arrive; memory where /proc gives its size.

    Raises:
      TimeoutError, MemoryError: in the block.
    """
    with _limited_memory(), _limited_time():
        yield


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # another system
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_pages * resource.getpagesize() + _BYTES
    lowest = min([limit, *(known for known in (soft, hard) if known != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"took more than {_SECONDS:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    # again and again: a template that is compiled swallows what its constants raise
    timer = signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
