"""Thresholds without sorting: importances are counted by their bits, where they are.

For models of billions of weights, possibly spread over devices: every pass goes over one leaf after
the other and leaves numbers only. Programs are compiled for each shape of a leaf, which for small
networks takes longer than to sort all weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32, Int64

from dlc_jax.distributed import fetch

HALF = 16  # bits
KeyOf = Callable[[jax.Array], jax.Array]  # weights or importances -> integers in their order


def keys_and_cutoffs(
    leaves: Sequence[jax.Array | np.ndarray], counts: Int64[np.ndarray, " m"], key_of: KeyOf
) -> tuple[Int32[np.ndarray, " m"], Int32[np.ndarray, "m leaves"]]:
    """Returns the key at each threshold, and where the ties begin that are kept.

    Keys are counted by the upper half of their bits, and then, in the bins where a threshold lies,
    by the lower half.

    Args:
      leaves: Weights or importances, in the order in which ties go.
      counts: [m] how many go, each less than there are.
      key_of: Gives int32 keys that are not negative.
    """
    upper = _total(_upper_counts(leaf, key_of) for leaf in leaves)
    ends = np.cumsum(upper)
    bins = np.searchsorted(ends, counts, side="right")
    num_below = (ends - upper)[bins]
    hit, slots = np.unique(bins, return_inverse=True)  # bins that hold thresholds
    place = np.full(1 << HALF, len(hit), np.int32)
    place[hit] = np.arange(len(hit))
    lower = _total(_lower_counts(leaf, place, len(hit), key_of) for leaf in leaves)
    ends = np.cumsum(lower)  # of one bin after the other
    below, first = ends - lower, slots << HALF
    wanted = counts - num_below + below[first]
    found = np.searchsorted(ends, wanted, side="right")
    keys = (bins << HALF | found - first).astype(np.int32)
    num_tied = wanted - below[found]  # that go
    equal = np.stack([fetch(_equal_counts(leaf, keys, key_of)) for leaf in leaves], axis=1)
    before = np.cumsum(equal, axis=1, dtype=np.int64) - equal
    left = np.clip(num_tied[:, None] - before, 0, equal)  # ties that go from each leaf
    cutoffs = np.where(left == equal, [leaf.size for leaf in leaves], 0)
    cutoffs[left == 0] = 0
    for k, number in zip(*np.nonzero((left > 0) & (left < equal)), strict=True):
        cutoffs[k, number] = fetch(_position(leaves[number], keys[k], left[k, number], key_of))
    return keys, cutoffs.astype(np.int32)


@functools.partial(jax.jit, static_argnames="key_of")
def _upper_counts(leaf: jax.Array, key_of: KeyOf) -> jax.Array:
    return jnp.bincount((key_of(leaf) >> HALF).ravel(), length=1 << HALF)


@functools.partial(jax.jit, static_argnames=("num_places", "key_of"))
def _lower_counts(leaf: jax.Array, place: jax.Array, num_places: int, key_of: KeyOf) -> jax.Array:
    key = key_of(leaf).ravel()
    at = (jnp.asarray(place)[key >> HALF] << HALF) | (key & ((1 << HALF) - 1))
    return jnp.bincount(at, length=num_places << HALF)


@functools.partial(jax.jit, static_argnames="key_of")
def _equal_counts(leaf: jax.Array, keys: jax.Array, key_of: KeyOf) -> jax.Array:
    key = key_of(leaf)
    return jax.lax.map(lambda wanted: (key == wanted).sum(dtype=jnp.int32), keys)


@functools.partial(jax.jit, static_argnames="key_of")
def _position(leaf: jax.Array, key: jax.Array, nth: jax.Array, key_of: KeyOf) -> jax.Array:
    """Returns the position of the weight with this key that nth others come before."""
    is_it = (key_of(leaf) == key).ravel()
    return jnp.argmax(jnp.cumsum(is_it, dtype=jnp.int32) > nth)


def _total(counts: Iterable[jax.Array]) -> Int[np.ndarray, " bins"]:
    """Sums counts of leaves, one after the other, in 64 bits, which a few of billions need."""
    return functools.reduce(np.add, (fetch(count).astype(np.int64) for count in counts))
