"""Memory of one job on every device and host, and which setting to turn so that it fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from dlc_jax.planning.machine import is_processor, num_here

ALWAYS = "always"
_MOST_DEVICES = 256


class Memory(NamedTuple):
    """Memory of one kind.

    Attributes:
      name: What for.
      num_bytes: Bytes on every device, or of every process.
      when: Parts of different times share memory, other than `always`.
    """

    name: str
    num_bytes: int
    when: str = ALWAYS


class MemoryPlan(NamedTuple):
    """Memory of one job on every device, or of one process."""

    parts: tuple[Memory, ...]

    @classmethod
    def of(cls, *parts: Memory) -> MemoryPlan:
        """Returns the plan of those parts that take any."""
        return cls(tuple(part for part in parts if part.num_bytes))

    @property
    def num_bytes(self) -> int:
        """Most bytes at any time."""
        totals = {ALWAYS: 0}
        for part in self.parts:
            totals[part.when] = totals.get(part.when, 0) + part.num_bytes
        return totals.pop(ALWAYS) + max(totals.values(), default=0)


Values = Iterable[tuple[str, "DeviceJob"]]  # a setting with its values, in the order to try


@runtime_checkable
class DeviceJob(Protocol):
    """What takes memory of devices."""

    def describe(self) -> str:
        """Returns its settings in words."""
        ...

    def plan(self) -> MemoryPlan:
        """Returns what it takes of every device."""
        ...

    def changes(self) -> Iterator[Values]:
        """Yields the settings that make it smaller, each with the job of every value."""
        ...


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays in a tree, from their shapes and types."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ways_out(job: DeviceJob, limit: int) -> str:
    """Returns the settings each of which alone makes it fit, changed as little as can be.

    Args:
      job: Takes too much.
      limit: Bytes of every device that may be planned with.
    """
    ways: list[str] = []
    for values in job.changes():
        ways += next(([name] for name, other in values if other.plan().num_bytes <= limit), [])
    if not ways:
        return f"no single setting helps, up to {_MOST_DEVICES} devices; change several"
    return f"try {', or '.join(ways)}"


class Host(NamedTuple):
    """A stage's part of a host.

    Attributes:
      memory: Memory of a process.
      way: Returns the setting to turn where so many bytes are too many.
    """

    memory: MemoryPlan
    way: Callable[[int], str]

    @classmethod
    def of(
        cls,
        job: DeviceJob,
        *parts: Memory,
        otherwise: str,
        first: Callable[[int], str | None] = lambda excess: None,
    ) -> Host:
        """Returns a host that also holds what its devices take of it: only processors take any.

        Args:
          job: What the devices do.
          parts: All else that a process holds.
          otherwise: What to do where devices take nothing of it: their settings do not help.
          first: Returns the setting to turn before those of the devices; None: it does not help.
        """
        takes, num = job.plan().num_bytes, num_here(local=True)

        def way(excess: int) -> str:
            if setting := first(excess):
                return setting
            return ways_out(job, takes - -(-excess // num)) if is_processor() else otherwise

        held = Memory("what devices hold", takes * num * is_processor())
        return cls(MemoryPlan.of(*parts, held), way)


def halved(
    setting: str, value: int, least: int, change: Callable[..., DeviceJob]
) -> Iterator[tuple[str, DeviceJob]]:
    """Yields the jobs with a setting of value / 2, value / 4, ... down to `least`.

    `change` takes it as a keyword, which is the setting's name behind the dot.
    """
    keyword = setting.rpartition(".")[2]
    for power in range(1, int(math.log2(max(1, value // least))) + 1):
        yield f"{setting}={value >> power}", change(**{keyword: value >> power})


def doubled(
    setting: str, value: int, others: int, with_value: Callable[[int], DeviceJob]
) -> Iterator[tuple[str, DeviceJob]]:
    """Yields the jobs on more devices, `others` for each that the setting has.

    `setting` has `{}` in the place of its value.
    """
    for power in range(1, 9):
        if (num := value << power) * others <= _MOST_DEVICES:
            yield setting.format(num), with_value(num)
