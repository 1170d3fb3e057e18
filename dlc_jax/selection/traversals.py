"""The greedy traversals of a feature space, compiled: memory for one number per sample.

Distances come from one matrix-vector product a step, which XLA runs ten times faster on CPU than
differences. All is in float64, so to be called under jax.enable_x64: a step is bound by memory, not
by arithmetic, and in float32 the samples of a tight cluster would count as copies of each other.
Rows are padded to few lengths and the budget is an argument, so that classes share programs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float64, Int, Int32

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
def farthest_first(space: Space, budget: Int[Array, ""], *, swapped: bool) -> Int32[Array, " n"]:
    """Returns rows in the order of a farthest-first traversal, padding after the first `budget`.

    Starts at the row nearest the centre; then always the row farthest from its nearest chosen one.
    The lowest of equal rows goes first.

    Args:
      space: The samples.
      budget: Rows to choose, in [0, num_samples].
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
    start = jnp.argmin(jnp.where(is_sample, from_centre, jnp.inf)).astype(jnp.int32)
    nearest = jnp.where(is_sample, jnp.inf, -1.0).astype(jnp.float64)
    order = jnp.zeros(len(rows), jnp.int32)
    return jax.lax.fori_loop(0, budget, step, (order, nearest, start))[0]


@functools.partial(jax.jit, static_argnames="farthest")
def follow_mean(space: Space, budget: Int[Array, ""], *, farthest: bool) -> Int32[Array, " n"]:
    """Returns rows in the order of herding, padding after the first `budget`.

    Each is the row that, added to those chosen, leaves their sum nearest 0, the mean of all rows.
    The lowest of equal rows goes first.

    Args:
      space: The samples, in squared Euclidean distance, centred on their mean.
      budget: Rows to choose, in [0, num_samples].
      farthest: Take the row that leaves it farthest from 0 instead.
    """
    rows, norms = space.rows, space.norms
    sign = 1.0 if farthest else -1.0

    def step(number: Int[Array, ""] | int, state: tuple) -> tuple:
        order, is_free, total = state
        # short of |total|^2, which all share
        squares = norms + 2 * _products(rows, total)
        chosen = jnp.argmax(jnp.where(is_free, sign * squares, -jnp.inf)).astype(jnp.int32)
        return order.at[number].set(chosen), is_free.at[chosen].set(False), total + rows[chosen]

    order = jnp.zeros(len(rows), jnp.int32)
    is_free = jnp.arange(len(rows)) < space.num_samples
    return jax.lax.fori_loop(0, budget, step, (order, is_free, jnp.zeros_like(rows[0])))[0]


def _products(rows: Float64[Array, "n d"], row: Float64[Array, " d"]) -> Float64[Array, " n"]:
    return jnp.matmul(rows, row, precision=jax.lax.Precision.HIGHEST)
