"""How the steps of a loop stop, in all processes at once: what is done is kept, then it ends."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlc_jax import signals
from dlc_jax.distributed import processes
from dlc_jax.signals import Stopped

__all__ = ["Stopped", "at_steps", "check", "is_due", "stop_together"]

_STEPS_LATE = 2  # so that no step waits for the answer of the one before
_most = jax.jit(jnp.max)
_pending: collections.deque[jax.Array] = collections.deque()  # answers that nobody waits for yet


def check() -> None:
    """Raises `Stopped` if the run was asked to stop while that was put off."""
    if number := processes.value_of_first(signals.asked):
        signals.note(number)
        raise Stopped


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """Puts `Stopped` off, in here: a loop asks `is_due` after every step, saves, and raises it."""
    _pending.clear()
    with signals.deferred():
        yield


def is_due() -> bool:
    """Whether to stop after this step, within `at_steps`.

    All processes have to ask at the same steps, and get the same answer if any was asked to stop.
    """
    if not signals.is_deferred() or processes.count() == 1:
        return signals.is_deferred() and signals.asked() > 0
    _pending.append(_largest(signals.asked()))
    if len(_pending) <= _STEPS_LATE:
        return False
    number = int(_pending.popleft())
    signals.note(number)
    return number > 0


def stop_together() -> NoReturn:
    """Raises `Stopped` once all processes have come here.

    The end of one would end another that still writes what it leaves.
    """
    processes.wait_for_all()
    raise Stopped


def _largest(value: int) -> jax.Array:
    """Returns the largest value of all processes, without waiting for it."""
    mesh = Mesh(np.array(jax.devices()), "all")
    here = np.full(1, value, np.int32)
    spread = NamedSharding(mesh, PartitionSpec("all"))
    return _most(jax.make_array_from_callback((mesh.size,), spread, lambda _: here))
