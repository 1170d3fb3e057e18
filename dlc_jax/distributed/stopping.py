"""SIGTERM, by which schedulers say that a job has to go: what is done is kept, then it ends."""

from __future__ import annotations

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.distributed import processes

_STEPS_LATE = 2  # so that no step waits for the answer of the one before
_asked = False
_is_deferred = False
_pending: collections.deque[jax.Array] = collections.deque()  # answers that nobody waits for yet


class Stopped(BaseException):
    """The run was asked to stop. No `Exception`: nothing on the way should go on after it."""


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into `Stopped`, in here."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if not _is_deferred:
        raise Stopped


def check() -> None:
    """Raises `Stopped` if the run was asked to stop while that was put off."""
    if processes.told_by_first(lambda: _asked):
        raise Stopped


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """Puts `Stopped` off, in here: a loop asks `is_due` after every step, saves, and raises it."""
    global _is_deferred
    _pending.clear()
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False


def is_due() -> bool:
    """Whether to stop after this step, within `at_steps`.

    All processes have to ask at the same steps, and get the same answer if any was asked to stop.
    """
    if not _is_deferred or processes.count() == 1:
        return _is_deferred and _asked
    _pending.append(_any(_asked))
    return len(_pending) > _STEPS_LATE and bool(_pending.popleft())


def _any(value: bool) -> jax.Array:
    """Returns whether the value is true in any process, without waiting for it."""
    devices = np.array(jax.devices())
    spread = jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, "all"), jax.sharding.PartitionSpec("all")
    )
    flags = jax.make_array_from_callback(
        (len(devices),), spread, lambda where: np.full(1, value, np.int32)
    )
    return _most(flags)


@jax.jit
def _most(flags: jax.Array) -> jax.Array:
    return jnp.max(flags)
