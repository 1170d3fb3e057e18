"""Where parameters and rows of samples lie on a mesh.

Weights are spread, and so are the rows of every program call: XLA's partitioner then gathers the
weights of one layer at a time, as fully sharded data parallelism does by hand.

Source: Zhao et al. 2023, arXiv 2304.11277, for the scheme.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlc_jax.distributed import processes
from dlc_jax.distributed.mesh import AXES, FSDP
from dlc_jax.types import Params

# Path of a parameter -> whether it is spread; the first full match counts. Norms are a thousandth
# of the weights. An adapter is a few hundred: its gradients are summed over devices anyway, and a
# gather in every layer would cost more time than the memory is worth.
_RULES = (
    (r".*/lora_[ab]", False),
    (r"(.*/)?\w*norm\w*/scale", False),
    (r"embedding/embedding|.*kernel", True),
)
Tree = TypeVar("Tree")
Value = TypeVar("Value")


def partition(path: str, shape: Sequence[int], num_devices: int) -> PartitionSpec:
    """Returns how a parameter lies on the mesh.

    Args:
      path: Path of a parameter of a decoder.
      shape: Shape of the parameter. The largest dimension that `num_devices` divides is spread, the
        first of equals; where there is none, every device holds the parameter.
      num_devices: Number of devices along the axis `FSDP`.
    """
    is_spread = next(spread for pattern, spread in _RULES if re.fullmatch(pattern, path))
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
    assert isinstance(array.sharding, NamedSharding)
    where = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(_everywhere(where)(array))


@functools.cache
def _everywhere(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=where)
