"""Where parameters and rows of samples lie on a mesh.

Weights are spread, and so are the rows of every program call: XLA's partitioner then gathers the
weights of one layer at a time, as fully sharded data parallelism does by hand.

Source: Zhao et al. 2023, arXiv 2304.11277, for the scheme.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlc_jax.types import Params

FSDP = "fsdp"  # name of the axis that weights are spread over

# Path of a parameter -> whether it is spread; the first full match counts. Norms are a thousandth
# of the weights. An adapter is a few hundred: its gradients are summed over devices anyway, and a
# gather in every layer would cost more time than the memory is worth.
_RULES = (
    (r".*/lora_[ab]", False),
    (r"(.*/)?\w*norm\w*/scale", False),
    (r"embedding/embedding|.*kernel", True),
)
Tree = TypeVar("Tree")


def partition(path: str, shape: Sequence[int], num_devices: int) -> PartitionSpec:
    """Returns how a parameter lies on the mesh.

    Args:
      path: Of the parameter of a decoder.
      shape: Of it. The largest dimension that `num_devices` divides is spread, the first of equals;
        where there is none, every device holds the parameter.
      num_devices: Of the axis `FSDP`.
    """
    is_spread = next(spread for pattern, spread in _RULES if re.fullmatch(pattern, path))
    fitting = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    if not is_spread or not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda axis: (shape[axis], -axis))
    return PartitionSpec(*(FSDP if axis == largest else None for axis in range(len(shape))))


def sharding_of(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns what `load_language_model` takes: path and shape of a parameter -> where it lies."""
    return lambda path, shape: NamedSharding(mesh, partition(path, shape, mesh.shape[FSDP]))


def whole_rows(params: Params, num_rows: int) -> int:
    """Returns the next number of rows that can be spread as the parameters are."""
    mesh = _mesh_of(params)
    num_devices = 1 if mesh is None else mesh.shape[FSDP]
    return -(-num_rows // num_devices) * num_devices


def over_devices(params: Params, rows: Tree) -> Tree:
    """Returns arrays of one row per sample, spread over the devices that the parameters are on.

    Args:
      params: Of the program that is fed. Where they are on one device, so are the rows.
      rows: Host arrays [b ...]. Rows are added, as the first one, until their number divides: a
        device that repeats a row costs no more than one that waits.
    """
    mesh = _mesh_of(params)
    if mesh is None:
        return jax.tree.map(jnp.asarray, rows)
    where = NamedSharding(mesh, PartitionSpec(FSDP))

    def place(array: np.ndarray) -> jax.Array:
        missing = whole_rows(params, len(array)) - len(array)
        return jax.device_put(np.concatenate([array, np.repeat(array[:1], missing, 0)]), where)

    return jax.tree.map(place, rows)


def on_every_device(params: Params, tree: Tree) -> Tree:
    """Returns arrays as each device of the parameters holds them all."""
    mesh = _mesh_of(params)
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh that parameters were spread over; None: they are on one device."""
    for leaf in jax.tree.leaves(params):
        where = leaf.sharding
        if isinstance(where, NamedSharding) and FSDP in where.mesh.axis_names:
            assert isinstance(where.mesh, Mesh)
            return where.mesh
    return None
