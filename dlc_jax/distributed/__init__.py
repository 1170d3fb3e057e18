"""Many devices and processes: the devices of a run as a grid, what lies where, where calls run.

How processes find each other and share what one has is in `processes`, how they end in `watch`.

Weights of language models are spread, and so are the rows of every program call: XLA's partitioner
then gathers the weights of one layer at a time, as fully sharded data parallelism does by hand.

Source: Zhao et al. 2023, arXiv 2304.11277, for the scheme.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlc_jax import expect
from dlc_jax.distributed import processes
from dlc_jax.types import Params

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
        expect.integer(f"mesh.{name}", size, None if (name, size) == (DATA, -1) else 1)
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    found = f"{len(devices)} of kind {devices[0].device_kind}"
    if len(devices) % (probe * fsdp) or data not in (-1, len(devices) // (probe * fsdp)):
        left = "" if data == -1 else f"mesh.data {data} x "
        raise expect.InputError(
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
        return self._replace(mesh=Mesh(self.mesh.devices[: max(num_rows, 1)], AXES))

    def share(self, num_items: int) -> range:
        """Returns the items of this team: neighbours, as many as others have."""
        bounds = [num_items * number // self.num_teams for number in (self.number, self.number + 1)]
        return range(*bounds)


Tree = TypeVar("Tree")
Value = TypeVar("Value")


def partition(path: str, shape: Sequence[int], num_devices: int) -> PartitionSpec:
    """Returns how a parameter of a language model lies on the mesh.

    Matrices are spread. Norms and biases are a thousandth of the weights, and an adapter is under a
    hundredth: its gradients are summed over devices anyway, and a gather in every layer would cost
    more time than the memory is worth.

    Args:
      path: Path of the parameter.
      shape: Shape of the parameter. The largest dimension that `num_devices` divides is spread, the
        first of equals; where there is none, every device holds the parameter.
      num_devices: Number of devices along the axis `FSDP`.
    """
    is_spread = len(shape) > 1 and not path.endswith(("/lora_a", "/lora_b"))
    fitting = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    if not is_spread or not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda axis: (shape[axis], -axis))
    return PartitionSpec(*(FSDP if axis == largest else None for axis in range(len(shape))))


def sharding_of(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Returns where a parameter of a decoder lies; see `partition`."""
    return NamedSharding(mesh, partition(path, shape, mesh.shape[FSDP]))


def mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh that parameters were spread over; None: they are on one device."""
    for leaf in jax.tree.leaves(params):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and FSDP in mesh.axis_names:
            return mesh
    return None


def whole_rows(params: Params, num_rows: int) -> int:
    """Returns the next number of rows that can be spread over all devices of the parameters."""
    mesh = mesh_of(params)
    num_devices = 1 if mesh is None else mesh.size
    return -(-num_rows // num_devices) * num_devices


def over_devices(params: Params, rows: Tree) -> Tree:
    """Returns arrays of one row per sample, spread over the devices that the parameters are on.

    Args:
      params: Parameters of the program. Where they are on one device, so are the rows.
      rows: Host arrays [b ...], the same in every process. Rows are added, as the first one, until
        their number divides: a device that repeats a row costs no more than one that waits.
    """
    mesh = mesh_of(params)
    put = jnp.asarray if mesh is None else functools.partial(place_rows, mesh)
    return jax.tree.map(put, rows)


def filled_up(array: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns an array of that many rows, the first one repeated at the end."""
    return np.concatenate([array, np.repeat(array[:1], num_rows - len(array), 0)])


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns where the rows of samples lie: divided among all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def whole_on(mesh: Mesh) -> NamedSharding:
    """Returns where that lies which every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def place(array: Any, where: jax.sharding.Sharding | None) -> jax.Array:
    """Returns a host array, the same in every process, on devices; None: on the default one."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def on_every_device(params: Params, tree: Tree) -> Tree:
    """Returns arrays as each device of the parameters holds them all."""
    mesh = mesh_of(params)
    return tree if mesh is None else replicated(mesh, tree)


def place_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Returns rows, the same in every process, divided among all devices; see `over_devices`."""
    num_rows = -(-len(rows) // mesh.size) * mesh.size
    return place(filled_up(rows, num_rows), by_rows(mesh))


def rows_here(mesh: Mesh, num_rows: int) -> range:
    """Returns which of the rows that are divided among all devices lie on this process's."""
    is_mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    each = num_rows // mesh.size
    first = is_mine.index(True)
    return range(first * each, (first + sum(is_mine)) * each)


def from_rows_here(mesh: Mesh, rows: np.ndarray, num_rows: int) -> jax.Array:
    """Returns rows divided among all devices, of which each process gives its own.

    Args:
      mesh: The devices.
      rows: Those of `rows_here`.
      num_rows: Rows in all processes, a multiple of the number of devices.
    """
    return jax.make_array_from_process_local_data(by_rows(mesh), rows, (num_rows, *rows.shape[1:]))


def from_first(mesh: Mesh, tree: Tree, value: Value) -> tuple[Tree, Value]:
    """Returns what the first process has, its arrays as each device of the mesh holds them all.

    Args:
      mesh: The devices.
      tree: Host arrays; those of other processes decide shapes and types alone.
      value: Value that JSON can hold, sent as well.
    """
    if mesh.is_multi_process:
        tree = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
        value = processes.value_of_first(lambda: value)
    return replicated(mesh, tree), value


def positions_from_first(found: np.ndarray | None) -> np.ndarray:
    """Returns the positions, [k] int64, that the first process gives, in all processes."""
    if processes.count() == 1:
        assert found is not None
        return found
    num = processes.value_of_first(lambda: 0 if found is None else len(found))
    mine = np.zeros(num, np.int32) if found is None else found.astype(np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.int64)


def replicated(mesh: Mesh, tree: Tree) -> Tree:
    """Returns arrays, the same in every process, as each device of the mesh holds them all."""
    return jax.tree.map(lambda leaf: place(leaf, whole_on(mesh)), tree)


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns an array on the host.

    Where this process's devices do not have all of it, the rest comes from other processes, and all
    of them have to call this.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    parts = {str(shard.index): shard for shard in array.addressable_shards}
    if sum(shard.data.size for shard in parts.values()) == array.size:
        whole = np.empty(array.shape, array.dtype)
        for shard in parts.values():
            whole[shard.index] = shard.data
        return whole
    return multihost_utils.process_allgather(array, tiled=True)


def hides_bar(progress: bool) -> bool | None:
    """Returns tqdm's `disable`: the first process shows a bar, if asked for."""
    return None if progress and processes.is_first() else True


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a call keeps its work, on which devices it runs, and whether it shows bars.

    Attributes:
      folder: The same call resumes from what is finished there, on other devices too. For probes
        it is scratch, yours to remove afterwards, and processes of `jax.distributed` that are given
        the same mesh and folder share the work; training also leaves its result there. None:
        nowhere.
      mesh: Devices, from `make_mesh`: batches are divided among its axis `data`, probes among
        `probe`. Losses of probes are the same on any mesh, training is so to rounding. None: the
        default device.
      progress: Whether to show bars on the terminal, of the first process where there are more.
    Raises:
      ValueError: a folder that is no path, or a mesh that is none.

    Example: `dlc.probe(encoder, dataset, run=dlc.Run(folder="runs/mine", progress=True))`.
    """

    folder: str | Path | None = None
    mesh: Mesh | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, kinds, expected in (
            ("folder", self.folder, (str, Path), "a path"),
            ("mesh", self.mesh, (Mesh,), "what dlc.make_mesh(...) gives"),
        ):
            if value is not None and not isinstance(value, kinds):
                found = expect.shortened(repr(value))
                raise expect.InputError(f"run.{name}: expected {expected} or None, got {found}.")

    @property
    def path(self) -> Path | None:
        """The folder as a path."""
        return None if self.folder is None else Path(self.folder)
