"""Devices and hosts that are planned for, and how much they hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax

from dlc_jax.config.sections import MeshConfig
from dlc_jax.distributed import cores_are_devices

USABLE = 0.9  # of memory; the rest goes to the driver, libraries and fragmentation
_LIMIT_OF_GROUP = Path("/sys/fs/cgroup/memory.max")


class Machine(NamedTuple):
    """Devices that are planned for.

    Attributes:
      name: For tables.
      num_devices: Number of devices, over all processes.
      bytes_each: Memory of one.
    """

    name: str
    num_devices: int
    bytes_each: int

    @property
    def limit(self) -> int:
        """Bytes of a device that may be planned with."""
        return int(USABLE * self.bytes_each)


class MeshSize(NamedTuple):
    """How many devices along each axis."""

    data: int
    probe: int
    fsdp: int

    @classmethod
    def of(cls, config: MeshConfig) -> MeshSize:
        """Returns the mesh that is asked for, whether or not that many devices are here."""
        rest = config.probe * config.fsdp
        data = max(1, num_here() // rest) if config.data == -1 else config.data
        return cls(data, config.probe, config.fsdp)

    @property
    def num_devices(self) -> int:
        return self.data * self.probe * self.fsdp

    @property
    def num_hosts(self) -> int:
        """Processes that many devices make, each with as many as this one has."""
        return -(-self.num_devices // num_here(local=True))

    @property
    def note(self) -> str | None:
        """The note to print if these are not the devices that are here."""
        if self.num_devices == num_here():
            return None
        axes = " x ".join(f"mesh.{axis} {size}" for axis, size in self._asdict().items())
        return (
            f"note: planned for {axes} = {self.num_devices} devices of the kind that is here; "
            f"{num_here()} are here"
        )


def num_here(*, local: bool = False) -> int:
    """Returns the number of devices, of this process or of all; of CPU cores, one for all."""
    if cores_are_devices():
        return 1
    return jax.local_device_count() if local else jax.device_count()


def this_machine(num_devices: int) -> Machine:
    """Returns so many devices of the kind that is here."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        bytes_each = stats["bytes_limit"]
    else:  # devices that are the host's processor share its memory
        here = max(-(-num_devices // jax.process_count()), num_here(local=True))
        bytes_each = host_memory() // here
    return Machine(f"{num_devices} x {device.device_kind}", num_devices, bytes_each)


def is_processor() -> bool:
    """Whether devices are the host's processor: they share its memory and its cores."""
    return jax.default_backend() == "cpu"


def host_memory() -> int:
    """Returns the bytes that this process may take: the machine's, or its control group's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or it says "max"
        memory = min(memory, int(_LIMIT_OF_GROUP.read_text()))
    return memory


def resident_bytes() -> int:
    """Returns the memory that this process has now."""
    with contextlib.suppress(OSError):  # no Linux
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
