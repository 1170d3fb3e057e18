"""Masks of the authors' released code for instructions: the same share of every linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.masking.torch_ties import removal_steps
from dlc_jax.types import Params, by_path, path_name


class MaskedByLayer(NamedTuple):
    """A masked copy of a model.

    Attributes:
      params: Its parameters; those that are not masked are the model's own.
      sparsity: Share of the weights of all masked layers that is zero.
    """

    params: Params
    sparsity: float


def masked_by_layer(
    params: Params, is_linear: Callable[[str], bool], share: float
) -> MaskedByLayer:
    """Zeroes round(share n) of the n weights of every layer, the smallest, ties as torch.

    Args:
      params: Parameters of a model.
      is_linear: Whether a path is the weight of a linear layer.
      share: In [0, 1].
    """
    leaves = by_path(params)
    paths = [path for path in leaves if is_linear(path)]
    num_zeroed = {path: round(share * leaves[path].size) for path in paths}
    sparsity = sum(num_zeroed.values()) / sum(leaves[path].size for path in paths)

    def mask_leaf(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if not num_zeroed.get(name):
            return leaf
        steps = removal_steps(params, (name,), np.array([0, num_zeroed[name]]))
        is_kept = jax.device_put(steps[name] > 1, getattr(leaf, "sharding", None))
        return jnp.where(is_kept, leaf, jnp.zeros_like(leaf))

    return MaskedByLayer(jax.tree_util.tree_map_with_path(mask_leaf, params), sparsity)
