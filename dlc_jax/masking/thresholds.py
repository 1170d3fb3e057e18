"""A probe as a threshold on importance: exact counts, ties broken by position in torch's layout.

The masks of a path are nested, so one number tells a masked network apart from the next. Where
several weights share the importance at the threshold, a position decides which of them go; without
it the count would miss by thousands on half-precision checkpoints. See `torch_order`.

Importances are sorted, or, of models of billions of weights, possibly spread over devices, counted
by their bits: every pass goes over one leaf after the other and leaves numbers only. Programs are
compiled for each shape of a leaf, which for small networks takes longer than to sort all weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32, Int64, Real

from dlc_jax import expect
from dlc_jax.distributed import fetch
from dlc_jax.masking.torch_order import TorchLayout
from dlc_jax.types import Deferred, Params, by_path, computed, path_name

# Importance per prunable leaf, by path; None where it is the weight's own magnitude, which is
# then computed on the fly and costs no memory.
Importance: TypeAlias = dict[str, np.ndarray | jax.Array] | None

MASKINGS = ("l1", "random")


def prunable_paths(
    params: Params,
    is_prunable: Callable[[str], bool],
    module_order: Callable[[str], Any] | None = None,
) -> tuple[str, ...]:
    """Returns the paths of the prunable leaves, in the order in which ties go.

    Args:
      params, is_prunable: See `Encoder`.
      module_order: Sort key that gives the order of torch's modules; None: the order of the tree.
    Raises:
      ValueError: no leaf is prunable, or one is not floating point.
    """
    leaves = by_path(params)
    paths = tuple(path for path in leaves if is_prunable(path))
    if not paths:
        shown = expect.listed(leaves)
        raise expect.InputError(
            f"encoder: is_prunable accepts none of its {len(leaves)} parameters ({shown})."
        )
    for path in paths:
        if not jax.numpy.issubdtype(leaves[path].dtype, np.floating):
            raise expect.InputError(
                f"encoder: prunable parameter {path} is {leaves[path].dtype}, expected floats."
            )
    return paths if module_order is None else tuple(sorted(paths, key=module_order))


def masked_text(params: Params, is_prunable: Callable[[str], bool]) -> str:
    """Returns what is masked by kind, such as `20 convolutions (694,736 weights) of 62 tensors`."""
    prunable = prunable_paths(params, is_prunable)
    leaves, kinds, others = by_path(params), dict[str, list[int]](), 0
    for path, leaf in leaves.items():
        num_axes = len(TorchLayout.of(path, leaf.shape).axes)
        if path in prunable:
            kinds.setdefault(_KINDS.get(num_axes, "other"), []).append(leaf.size)
        others += num_axes == 4 and path.endswith(_NAMES) and path not in prunable
    shown = " and ".join(
        f"{_number(len(sizes), kind)} ({sum(sizes):,} weights)" for kind, sizes in kinds.items()
    )
    left = f", not {_number(others, _KINDS[4])}" if others else ""
    return f"{shown} of {len(leaves)} tensors{left}"


_KINDS = {4: "convolution", 2: "linear layer"}  # by the axes of a weight in torch
_NAMES = ("kernel", "weight")


def _number(num: int, kind: str) -> str:
    return f"{num} {kind}{'s' * (num != 1)}"


def weight_importance(
    params: Params, prunable: tuple[str, ...], masking: str, seed: int
) -> Importance:
    """Returns how much each prunable weight matters; probes zero the least important first.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves.
      masking: `l1`, the weight's magnitude, or `random`, one uniform draw in [0, 1) for the whole
        path, in torch's order of weights.
      seed: Seed of the random draw.
    """
    if masking == "l1":
        return None
    generator = np.random.default_rng([seed, *b"importance"])
    leaves, drawn = by_path(params), dict[str, np.ndarray | jax.Array]()
    for path in prunable:
        layout = TorchLayout.of(path, leaves[path].shape)
        values = generator.random(layout.torch_shape, np.float32)
        drawn[path] = np.ascontiguousarray(layout.from_torch(values, leaves[path]))
    return drawn


HALF = 16  # bits
KeyOf = Callable[[jax.Array], jax.Array]  # weights or importances -> integers in their order


def keys_and_cutoffs(
    by_name: Mapping[str, jax.Array | np.ndarray], counts: Int64[np.ndarray, " m"], key_of: KeyOf
) -> tuple[Int32[np.ndarray, " m"], Int32[np.ndarray, "m leaves"]]:
    """Returns the key at each threshold, and where the ties begin that are kept.

    Keys are counted by the upper half of their bits, and then, in the bins where a threshold lies,
    by the lower half.

    Args:
      by_name: Weights or importances by path, in the order in which ties go.
      counts: [m] how many go, each less than there are.
      key_of: Gives int32 keys that are not negative.
    """
    leaves = list(by_name.values())
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
    layouts = [TorchLayout.of(path, leaf.shape) for path, leaf in by_name.items()]
    for k, number in zip(*np.nonzero((left > 0) & (left < equal)), strict=True):
        leaf, layout = leaves[number], layouts[number]
        cutoffs[k, number] = fetch(_position(leaf, keys[k], left[k, number], layout, key_of))
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


@functools.partial(jax.jit, static_argnames=("layout", "key_of"))
def _position(
    leaf: jax.Array, key: jax.Array, nth: jax.Array, layout: TorchLayout, key_of: KeyOf
) -> jax.Array:
    """Returns the position in torch of the weight with this key that nth others come before.

    Counted along torch's first axis, so that a row of it is put in order and not the leaf.
    """
    is_it = (key_of(leaf) == key).reshape(layout.shape)
    first, *others = layout.axes
    in_rows = is_it.sum(axis=tuple(others), dtype=jnp.int32)
    ends = jnp.cumsum(in_rows)
    row = jnp.argmax(ends > nth)
    in_row = jax.lax.dynamic_index_in_dim(is_it, row, first).transpose(layout.axes).ravel()
    left = nth - (ends - in_rows)[row]
    return row * in_row.size + jnp.argmax(jnp.cumsum(in_row, dtype=jnp.int32) > left)


def _total(counts: Iterable[jax.Array]) -> Int[np.ndarray, " bins"]:
    """Sums counts of leaves, one after the other, in 64 bits, which a few of billions need."""
    return functools.reduce(np.add, (fetch(count).astype(np.int64) for count in counts))


# A magnitude's bits, read as an integer, order as the magnitude does. Compared as floats, XLA on
# CPU takes all denormal weights for zero, and the count would miss.
_ALL_BUT_SIGN = 0x7FFFFFFF
TOO_MANY_TO_SORT = 1 << 28  # a gigabyte of keys


class Thresholds(NamedTuple):
    """m probes; leaf l keeps a weight if importance > value, or = value and position >= cutoff.

    Attributes:
      value: [m] importance at the threshold, of the importance's dtype.
      cutoff: [m, leaves] first kept position among the ties, within each prunable leaf, int32;
        positions as in torch.
    """

    value: Real[np.ndarray, " m"] | Real[jax.Array, "*m"]
    cutoff: Int[np.ndarray, "m leaves"] | Int[jax.Array, "*m leaves"]


def exact_thresholds(
    params: Params, prunable: tuple[str, ...], importance: Importance, counts: np.ndarray
) -> Thresholds:
    """Returns thresholds that zero exactly `counts[k]` weights, over all prunable leaves together.

    Ties are broken by position: leaves in the order of `prunable`, row-major in torch's layout
    within a leaf, the first first. One sort on the host, whatever the number of probes; or, for a
    large model, none.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves.
      importance: From `weight_importance`.
      counts: [m] weights to zero, each in [0, N).
    """
    by_name = by_path(params) if importance is None else importance
    matters = {path: by_name[path] for path in prunable}
    sizes = [leaf.size for leaf in matters.values()]
    if sum(sizes) >= TOO_MANY_TO_SORT:
        key_of = _magnitude if importance is None else _bits
        keys, cutoff = keys_and_cutoffs(matters, counts, key_of)
        dtype = by_name[prunable[0]].dtype
        return Thresholds(keys if importance is None else keys.view(dtype), cutoff)
    flat = np.concatenate(
        [
            TorchLayout.of(path, leaf.shape).in_torch(fetch(leaf)).ravel()
            for path, leaf in matters.items()
        ],
        dtype=np.float32 if importance is None else None,
    )
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "importance", "threshold", "place"),
    meta_fields=("layout",),
)
@dataclasses.dataclass(frozen=True)
class MaskedLeaf(Deferred):
    """A leaf some of whose weights are zeroed; see `Thresholds`.

    Attributes:
      weights: All of them.
      importance: Importance of each weight; None: its magnitude.
      threshold: One probe, of all prunable leaves.
      place: Number of this leaf among them; an array, so that leaves of one shape share a program.
      layout: Order in which positions are counted.
    """

    weights: jax.Array
    importance: jax.Array | None
    threshold: Thresholds
    place: jax.Array
    layout: TorchLayout

    def computed(self) -> jax.Array:
        """Returns the weights with zeros among them, of the same type."""
        matters = _magnitude(self.weights) if self.importance is None else self.importance
        position = self.layout.positions(self.weights)
        value, cutoff = self.threshold.value, self.threshold.cutoff[self.place]
        keep = (matters > value) | ((matters == value) & (position >= cutoff))
        return jnp.where(keep, self.weights, jnp.zeros_like(self.weights))


def deferred_masks(
    params: Params, prunable: tuple[str, ...], importance: Importance, threshold: Thresholds
) -> Params:
    """Returns the parameters with one probe's masks, which are made where a leaf is used.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves; of a decoder's blocks, the same leaves of each.
      importance: From `weight_importance`, as arrays on the device.
      threshold: One probe: `value` scalar, `cutoff` [leaves].
    """
    place = {path: index for index, path in enumerate(prunable)}
    threshold = Thresholds(*map(jnp.asarray, threshold))

    def of_leaf(path: tuple, leaf: jax.Array) -> jax.Array | MaskedLeaf:
        name = path_name(path)
        if name not in place:
            return leaf
        matters = None if importance is None else jnp.asarray(importance[name])
        layout = TorchLayout.of(name, leaf.shape)
        return MaskedLeaf(leaf, matters, threshold, jnp.asarray(place[name]), layout)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def masked(
    params: Params, prunable: tuple[str, ...], importance: Importance, threshold: Thresholds
) -> Params:
    """Returns the parameters with one probe's weights zeroed; traceable, keeps dtypes.

    Arguments are those of `deferred_masks`.
    """
    return computed(deferred_masks(params, prunable, importance, threshold))


def _magnitude(leaf: jax.Array) -> jax.Array:
    return _bits(leaf.astype(jnp.float32)) & _ALL_BUT_SIGN


def _bits(importance: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(importance, jnp.int32)
