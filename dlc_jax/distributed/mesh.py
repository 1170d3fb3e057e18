"""The devices of a run, in a grid whose axes say what is divided among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks

DATA, PROBE, FSDP = "data", "probe", "fsdp"
AXES = (DATA, PROBE, FSDP)
_FORCED = "xla_force_host_platform_device_count"
_MOST_CORES = 8  # each device holds its own weights and batch
_made_of_cores: list[bool] = []


def make_mesh(
    data: int = -1, probe: int = 1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns all devices of all processes as a mesh.

    Args:
      data: Parts of the samples; -1: as many as there are devices left.
      probe: Parts of the masked networks, which do not depend on each other.
      fsdp: Parts of the weights of a language model.
      devices: Only these; None: all.
    Raises:
      ValueError: the product is not the number of devices.
    Example:
      >>> import jax
      >>> dict(dlc.make_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'probe': 1, 'fsdp': 1}
    """
    for name, size in zip(AXES, (data, probe, fsdp), strict=True):
        checks.integer(f"mesh.{name}", size)
        if (name, size) != (DATA, -1):
            checks.at_least(f"mesh.{name}", size, 1)
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    found = f"{len(devices)} of kind {devices[0].device_kind}"
    if len(devices) % (probe * fsdp) or data not in (-1, len(devices) // (probe * fsdp)):
        left = "" if data == -1 else f"mesh.data {data} x "
        raise checks.InputError(
            f"mesh: {left}mesh.probe {probe} x mesh.fsdp {fsdp} is "
            f"{abs(data) * probe * fsdp} devices, {found} are there; expected a product of "
            f"{len(devices)}, or mesh.data=-1 and a divisor of it."
        )
    # not jax.make_mesh: its axes are of the kind where every operation has to name its sharding
    return Mesh(np.array(devices).reshape(-1, probe, fsdp), AXES)


def use_all_cores() -> None:
    """Makes a CPU device of every core, up to 8, before JAX has looked for devices.

    A batch per core is scored faster than one batch by all cores (docs/log/speed.md).
    Nothing is changed where the number of CPU devices was chosen already, by `JAX_NUM_CPU_DEVICES`
    or in `XLA_FLAGS`, and GPUs are used as before.

    Example:
      >>> import jax, os
      >>> dlc.use_all_cores()
      >>> jax.device_count("cpu") == min(len(os.sched_getaffinity(0)), 8)
      True
    """
    chosen = os.environ.get("JAX_NUM_CPU_DEVICES") or _FORCED in os.environ.get("XLA_FLAGS", "")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not chosen and not _made_of_cores:
        jax.config.update("jax_num_cpu_devices", min(num_cores or 1, _MOST_CORES))
        _made_of_cores.append(True)


def cores_are_devices() -> bool:
    """Whether the devices are the cores of one CPU, which no one has asked for."""
    return bool(_made_of_cores) and jax.default_backend() == "cpu"


def one_device() -> Mesh:
    """Returns a mesh of the default device alone."""
    device = getattr(jax.config, "jax_default_device")  # noqa: B009 - unknown to its type
    if not isinstance(device, jax.Device):  # none, or the name of a platform
        device = jax.local_devices(backend=device)[0]
    return make_mesh(devices=[device])


def said_of(mesh: Mesh) -> str:
    """Returns a phrase for messages that names the devices."""
    platform = mesh.devices.flat[0].platform
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    if not sizes:
        return platform
    num_processes = len({device.process_index for device in mesh.devices.flat})
    of = f" of {num_processes} processes" if num_processes > 1 else ""
    return f"{platform}, {mesh.size} devices{of} ({sizes})"


class Team(NamedTuple):
    """Processes that run the same program calls, and which part of the work is theirs.

    Attributes:
      mesh: Devices of this team.
      number: Which team this process is in, from 0.
      num_teams: How many there are.
    """

    mesh: Mesh
    number: int
    num_teams: int

    @classmethod
    def alone(cls, mesh: Mesh | None = None) -> Team:
        """All of the work on these devices; None: on the default one."""
        return cls(mesh or one_device(), 0, 1)

    @classmethod
    def of(cls, mesh: Mesh) -> Team:
        """Each process by itself, where it has whole rows of the mesh; else all together."""
        hosts = [{device.process_index for device in row.flat} for row in mesh.devices]
        known = set().union(*hosts)
        if len(known) == 1 or any(len(host) > 1 for host in hosts):
            return cls(mesh, 0, 1)
        mine = [host == {jax.process_index()} for host in hosts]
        number = sorted(known).index(jax.process_index())
        return cls(Mesh(mesh.devices[mine], AXES), number, len(known))

    def of_rows(self, num_rows: int) -> Team:
        """Returns the team on at most that many parts of the data axis, one or more."""
        few = self.mesh.devices[: max(num_rows, 1)]
        return self._replace(mesh=Mesh(few, AXES))

    def share(self, num_items: int) -> range:
        """Returns the items of this team: neighbours, as many as others have."""
        bounds = [num_items * number // self.num_teams for number in (self.number, self.number + 1)]
        return range(*bounds)
