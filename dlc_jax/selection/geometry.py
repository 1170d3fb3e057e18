"""Selections by where samples lie, in feature space or among softmax outputs.

Distances come from one matrix-vector product a step, which XLA runs ten times faster on CPU than
differences. All is in float64, so to be called under jax.enable_x64: a step is bound by memory, not
by arithmetic, and in float32 the samples of a tight cluster would count as copies of each other.
Rows are padded to few lengths and the budget is an argument, so that classes share programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Int32

from dlc_jax.selection.methods import Draw, Group, Positions, budget, strata_of

# Relative to the squared norms it is the difference of, a smaller distance is rounding error and
# counts as 0: copies of a chosen sample then tie, whatever the order of summation.
_ROUNDING = 1e-13


class Space(NamedTuple):
    """Rows with a divergence: norms[i] + norms[j] - 2 rows[i] . partner(rows[j]).

    Attributes:
      rows: Features of the samples, in their order; padding after them.
      norms: Norm of each row.
      centre: The row that stands for the mean of all samples.
      centre_norm: Its norm.
      num_samples: Rows that are no padding.
    """

    rows: Float64[Array, "n d"]
    norms: Float64[Array, " n"]
    centre: Float64[Array, " d"]
    centre_norm: Float64[Array, ""]
    num_samples: Int[Array, ""]


@functools.partial(jax.jit, static_argnames="swapped")
def farthest_first(
    space: Space, budget: Int[Array, ""], start: Int[Array, ""] | int = -1, *, swapped: bool
) -> Int32[Array, " n"]:
    """Returns rows in the order of a farthest-first traversal, padding after the first `budget`.

    After the first, always the row farthest from its nearest chosen one, the lowest of equal rows.

    Args:
      space: The samples.
      budget: Rows to choose, in [0, num_samples].
      start: The first row; -1: the one nearest the centre.
      swapped: A row's partner is the row with its halves swapped; else the row itself.
    """
    rows, norms = space.rows, space.norms
    is_sample = jnp.arange(len(rows)) < space.num_samples

    def distances(row: Float64[Array, " d"], norm: Float64[Array, ""]) -> Float64[Array, " n"]:
        partner = jnp.roll(row, len(row) // 2) if swapped else row
        difference = norms + norm - 2 * _products(rows, partner)
        rounding = _ROUNDING * (jnp.abs(norms) + jnp.abs(norm))
        return jnp.where(difference > rounding, difference, 0.0)

    def step(number: Int[Array, ""] | int, state: tuple) -> tuple:
        order, nearest, chosen = state
        nearest = jnp.minimum(nearest, distances(rows[chosen], norms[chosen]))
        nearest = nearest.at[chosen].set(-1.0)
        return order.at[number].set(chosen), nearest, jnp.argmax(nearest).astype(jnp.int32)

    from_centre = distances(space.centre, space.centre_norm)
    nearest_centre = jnp.argmin(jnp.where(is_sample, from_centre, jnp.inf))
    start = jnp.where(jnp.asarray(start) < 0, nearest_centre, start).astype(jnp.int32)
    nearest = jnp.where(is_sample, jnp.inf, -1.0).astype(jnp.float64)
    order = jnp.zeros(len(rows), jnp.int32)
    return jax.lax.fori_loop(0, budget, step, (order, nearest, start))[0]


@functools.partial(jax.jit, static_argnames=("farthest", "digits"))
def follow_mean(
    space: Space, budget: Int[Array, ""], *, farthest: bool, digits: int | None = None
) -> Int32[Array, " n"]:
    """Returns rows in the order of herding, padding after the first `budget`.

    Each is the row that, added to those chosen, leaves their sum nearest 0, the mean of all rows.
    The lowest of equal rows goes first.

    Args:
      space: The samples, in squared Euclidean distance, centred on their mean.
      budget: Rows to choose, in [0, num_samples].
      farthest: Take the row that leaves it farthest from 0 instead.
      digits: Decimals of squared distances, beyond which there is no difference; None: all.
    """
    rows, norms = space.rows, space.norms
    sign = 1.0 if farthest else -1.0

    def step(number: Int[Array, ""] | int, state: tuple) -> tuple:
        order, is_free, total = state
        # short of |total|^2, which all share
        squares = norms + 2 * _products(rows, total)
        squares = squares if digits is None else jnp.round(squares, digits)
        chosen = jnp.argmax(jnp.where(is_free, sign * squares, -jnp.inf)).astype(jnp.int32)
        return order.at[number].set(chosen), is_free.at[chosen].set(False), total + rows[chosen]

    order = jnp.zeros(len(rows), jnp.int32)
    is_free = jnp.arange(len(rows)) < space.num_samples
    return jax.lax.fori_loop(0, budget, step, (order, is_free, jnp.zeros_like(rows[0])))[0]


def _products(rows: Float64[Array, "n d"], row: Float64[Array, " d"]) -> Float64[Array, " n"]:
    return jnp.matmul(rows, row, precision=jax.lax.Precision.HIGHEST)


_BLOCK = 1024  # rows that are float64 at a time
_DIGITS = 10
_SMALLEST = np.finfo(np.float32).tiny  # a probability of 0 has the logarithm of this


def moderate(group: Group, draw: Draw) -> Positions:
    """Returns the samples whose distance to the group's mean is nearest the median distance.

    Equal ones are ordered by position.

    Source: Xia et al. 2023, Moderate coreset.
    """
    distances = _distances(group, _mean(group))
    order = np.argsort(np.abs(distances - np.median(distances)), kind="stable")
    return group.positions[order[: budget(group, draw)]]


def ccs_herding(group: Group, draw: Draw) -> Positions:
    """Herding within each of the strata of `ccs`, so that nothing is drawn.

    Squared distances have ten digits, since of two samples in a stratum either is as near its mean.

    Sources: see `herding` and `ccs`.
    """
    rest, strata, budgets = strata_of(group, draw)
    follow, kept = functools.partial(follow_mean, farthest=False, digits=_DIGITS), []
    for number, num in enumerate(budgets):
        if num:
            part = dataclasses.replace(group, positions=rest[strata == number])
            of_part = draw._replace(keep_fraction=num / len(part.positions))
            kept.append(_traversed(part, of_part, _around_the_mean, follow))
    return np.concatenate(kept) if kept else rest[:0]


def herding(group: Group, draw: Draw) -> Positions:
    """Greedily adds the sample that keeps the mean of those chosen nearest the group's mean.

    Variants `deepcore` and `paper`: the sample that takes it farthest away, DeepCore's sign slip.

    Source: Welling 2009, Herding dynamical weights to learn.
    """
    follow = functools.partial(follow_mean, farthest=draw.variant != "published")
    return _traversed(group, draw, _around_the_mean, follow)


def k_center_greedy(group: Group, draw: Draw) -> Positions:
    """Farthest-first traversal in Euclidean distance, from the sample nearest the group's mean.

    Variant `paper`: from a sample that is drawn.

    Source: Sener & Savarese 2018, Active learning for convolutional neural networks.
    """
    traversal = functools.partial(farthest_first, start=_start(group, draw), swapped=False)
    return _traversed(group, draw, _around_a_row, traversal)


def contextual_diversity(group: Group, draw: Draw) -> Positions:
    """Farthest-first traversal in KL(a, b) / 2 + KL(b, a) / 2, from the one nearest the mean.

    A probability of 0 counts as the smallest normal float32 where its logarithm is taken. Variant
    `paper`: from a sample that is drawn.

    Source: Agarwal et al. 2020, Contextual diversity for active learning.
    """
    traversal = functools.partial(farthest_first, start=_start(group, draw), swapped=True)
    return _traversed(group, draw, _divergence, traversal)


def _start(group: Group, draw: Draw) -> int:
    """Returns the place where a traversal starts; -1 for the one nearest the mean."""
    return int(group.ranks_by_lot(draw, "start")[0]) if draw.variant == "paper" else -1


def _traversed(
    group: Group, draw: Draw, space_of: Callable[[Group], Space], traversal: Callable
) -> Positions:
    """Returns the first of the group in the order of a traversal, as many as its budget."""
    num = budget(group, draw)
    with jax.enable_x64(True):
        order = traversal(space_of(group), jnp.asarray(num))
        return group.positions[np.asarray(order)[:num]]


def _around_the_mean(group: Group) -> Space:
    return _euclidean(group, _mean(group))


def _around_a_row(group: Group) -> Space:
    """Squared Euclidean distance with the row nearest the mean as the origin.

    The smaller the norms, the fewer digits their differences lose; the mean itself may lie far from
    all rows but an outlier.
    """
    nearest = group.positions[np.argmin(_distances(group, _mean(group)))]
    return _euclidean(group, group.rows[nearest].astype(np.float64))


def _euclidean(group: Group, origin: Float64[np.ndarray, " d"]) -> Space:
    """Squared Euclidean distance, in units of `_extent`."""
    unit = _extent(group, origin)

    def placed(block: Float64[np.ndarray, "b d"]) -> tuple[np.ndarray, np.ndarray]:
        centred = (block - origin) / unit
        return centred, np.square(centred).sum(axis=1)

    return _space(group, placed)


def _divergence(group: Group) -> Space:
    """Symmetric KL: rows are (p, log p) / 2, and a row's partner is (log p, p) / 2."""

    def placed(block: Float64[np.ndarray, "b d"]) -> tuple[np.ndarray, np.ndarray]:
        logarithms = np.log(np.maximum(block, _SMALLEST))
        return np.hstack([block, logarithms]) / 2, (block * logarithms).sum(axis=1) / 2

    return _space(group, placed)


def _space(group: Group, placed: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Space:
    """Returns the group's samples, and their mean, as `placed` puts blocks of them, padded."""
    (centre,), (centre_norm,) = placed(_mean(group)[None])
    num_samples = len(group.positions)
    rows = np.zeros((padded_length(num_samples), len(centre)))
    norms = np.zeros(len(rows))
    for start, block in zip(range(0, num_samples, _BLOCK), _blocks(group), strict=True):
        here = slice(start, start + len(block))
        rows[here], norms[here] = placed(block)
    # device_put, since jnp.asarray would hold a third copy of the rows for a moment
    return Space(*map(jax.device_put, (rows, norms, centre, centre_norm, np.asarray(num_samples))))


def _distances(group: Group, origin: Float64[np.ndarray, " d"]) -> Float64[np.ndarray, " n"]:
    """Returns the distance of each row, in units of `_extent`."""
    unit = _extent(group, origin)
    blocks = [np.linalg.norm((block - origin) / unit, axis=1) for block in _blocks(group)]
    return np.concatenate(blocks)


def placed(
    group: Group,
    origin: Float64[np.ndarray, " d"] | None = None,
    *others: Float64[np.ndarray, "_ d"],
) -> tuple[Float64[np.ndarray, "_ d"], ...]:
    """Returns the group's rows, and other rows, in units of `_extent`.

    Args:
      group: The samples.
      origin: What becomes 0; None: their mean.
      others: What is placed with them.
    """
    origin = _mean(group) if origin is None else origin
    unit = _extent(group, origin)
    rows = np.concatenate([(block - origin) / unit for block in _blocks(group)])
    return rows, *((some - origin) / unit for some in others)


def _extent(group: Group, origin: Float64[np.ndarray, " d"]) -> float:
    """Returns the power of two below the farthest coordinate.

    Squares of very large or small numbers are lost; to divide by a power of two rounds nothing.
    """
    farthest = max(float(np.abs(block - origin).max()) for block in _blocks(group))
    return math.ldexp(1.0, math.frexp(farthest)[1] - 1)


def _mean(group: Group) -> Float64[np.ndarray, " d"]:
    return sum(block.sum(axis=0) for block in _blocks(group)) / len(group.positions)


def _blocks(group: Group) -> Iterator[Float64[np.ndarray, "_ d"]]:
    """Yields the group's rows in float64, a few at a time."""
    for start in range(0, len(group.positions), _BLOCK):
        yield group.rows[group.positions[start : start + _BLOCK]].astype(np.float64)


def padded_length(num: int) -> int:
    """Returns the least of few lengths, four to each power of two, that is at least `num`."""
    step = 1 << max((num - 1).bit_length() - 3, 4)
    return -(-num // step) * step
