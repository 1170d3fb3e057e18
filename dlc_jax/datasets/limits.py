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
    with contextlib.ExitStack() as after:
        _limit_memory(after)
        if threading.current_thread() is threading.main_thread():
            after.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _stop))
            # again and again: a template that is compiled swallows what its constants raise
            timer = signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)
            after.callback(signal.setitimer, signal.ITIMER_REAL, *timer)
        yield


def _limit_memory(after: contextlib.ExitStack) -> None:
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # another system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_pages * resource.getpagesize() + _BYTES
    lowest = min([limit, *(known for known in (soft, hard) if known != resource.RLIM_INFINITY)])
    after.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))


def _stop(*_: object) -> NoReturn:
    raise TimeoutError(f"took more than {_SECONDS:g} s")
