"""A probe as a threshold on importance: exact counts, ties broken by position.

The masks of a path are nested, so one number tells a masked network apart from the next. Where
several weights share the importance at the threshold, a position decides which of them go; without
it the count would miss by thousands on half-precision checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Real

from dlc_jax.distributed import fetch
from dlc_jax.masking.counting import keys_and_cutoffs
from dlc_jax.masking.importance import Importance
from dlc_jax.types import Params, by_path, path_name

# A magnitude's bits, read as an integer, order as the magnitude does. Compared as floats, XLA on
# CPU takes all denormal weights for zero, and the count would miss.
_ALL_BUT_SIGN = 0x7FFFFFFF
TOO_MANY_TO_SORT = 1 << 28  # a gigabyte of keys


class Thresholds(NamedTuple):
    """m probes; leaf l keeps a weight if importance > value, or = value and position >= cutoff.

    Attributes:
      value: [m] importance at the threshold, of the importance's dtype.
      cutoff: [m, leaves] first kept position among the ties, within each prunable leaf, int32.
    """

    value: Real[np.ndarray, " m"] | Real[jax.Array, "*m"]
    cutoff: Int[np.ndarray, "m leaves"] | Int[jax.Array, "*m leaves"]


def exact_thresholds(
    params: Params, prunable: tuple[str, ...], importance: Importance, counts: np.ndarray
) -> Thresholds:
    """Returns thresholds that zero exactly `counts[k]` weights, over all prunable leaves together.

    Ties are broken by position: leaves in the order of `prunable`, row-major within a leaf, the
    first first. One sort on the host, whatever the number of probes; or, for a large model, none.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves.
      importance: From `weight_importance`.
      counts: [m] weights to zero, each in [0, N).
    """
    by_name = by_path(params) if importance is None else importance
    matters = [by_name[path] for path in prunable]
    sizes = [leaf.size for leaf in matters]
    if sum(sizes) >= TOO_MANY_TO_SORT:
        key_of = _magnitude if importance is None else _bits
        keys, cutoff = keys_and_cutoffs(matters, counts, key_of)
        return Thresholds(keys if importance is None else keys.view(matters[0].dtype), cutoff)
    dtype = np.float32 if importance is None else None
    flat = np.concatenate([fetch(leaf).ravel() for leaf in matters], dtype=dtype)
    if importance is None:
        flat = flat.view(np.int32) & _ALL_BUT_SIGN
    ascending = np.sort(flat)
    values = ascending[counts]
    num_tied = counts - np.searchsorted(ascending, values)
    first_kept = [
        np.flatnonzero(flat == value)[tied] if tied else 0
        for value, tied in zip(values, num_tied, strict=True)
    ]
    starts = np.cumsum(sizes) - sizes
    cutoff = np.clip(np.array(first_kept, np.int64)[:, None] - starts, 0, sizes)
    return Thresholds(values, cutoff.astype(np.int32))


def masked(
    params: Params, prunable: tuple[str, ...], importance: Importance, threshold: Thresholds
) -> Params:
    """Returns the parameters with one probe's weights zeroed; traceable, keeps dtypes.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves.
      importance: From `weight_importance`, as arrays on the device.
      threshold: One probe: `value` scalar, `cutoff` [leaves].
    """
    place = {path: index for index, path in enumerate(prunable)}

    def mask_leaf(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if name not in place:
            return leaf
        matters = _magnitude(leaf) if importance is None else jnp.asarray(importance[name])
        value, cutoff = jnp.asarray(threshold.value), jnp.asarray(threshold.cutoff)[place[name]]
        position = jax.lax.iota(jnp.int32, leaf.size).reshape(leaf.shape)
        keep = (matters > value) | ((matters == value) & (position >= cutoff))
        return jnp.where(keep, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(mask_leaf, params)


def _magnitude(leaf: jax.Array) -> jax.Array:
    return _bits(leaf.astype(jnp.float32)) & _ALL_BUT_SIGN


def _bits(importance: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(importance, jnp.int32)
