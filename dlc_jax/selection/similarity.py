"""Cosines between embeddings: of samples and targets, and of near-duplicates among samples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from dlc_jax import expect
from dlc_jax.selection.geometry import padded_length

_BLOCK = 1024  # samples that are compared with all others at a time


def similarities(
    features: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "q _"]
) -> Float32[np.ndarray, "n q"]:
    """Returns the cosine of each sample and each target, in [-1, 1]; higher is more alike.

    Args:
      features: From `dlc.response_features` or `dlc.features`.
      targets: Features of what the selected samples should be like, by the same model.
    Raises:
      ValueError: shapes that do not fit each other, rows that are not finite or are 0.
    Source: Ivison et al. 2025, arXiv 2503.01807, whose `rds` selects by them.
    Example:
      >>> features, targets = np.eye(3)[[0, 1, 1]], np.array([[0.0, 2.0, 0.0]])
      >>> dlc.similarities(features, targets).tolist()
      [[0.0], [1.0], [1.0]]
    """
    for name, rows in (("features", features), ("targets", targets)):
        if np.ndim(rows) != 2 or not np.size(rows):
            raise expect.InputError(f"{name}: expected [n, d], got shape {np.shape(rows)}.")
        expect.features_fit_labels(name, rows, np.zeros(len(rows), np.int64))
    if features.shape[1] != targets.shape[1]:
        raise expect.InputError(
            f"targets: have {targets.shape[1]} features, expected {features.shape[1]} as the "
            "samples; are they of the same model?"
        )
    units = _units("targets", targets, np.arange(len(targets)))
    found = np.empty((len(features), len(targets)), np.float32)
    for start in range(0, len(features), _BLOCK):
        own = np.arange(start, min(start + _BLOCK, len(features)))
        found[own] = np.clip(_products(_units("features", features, own), units), -1, 1)
    return found


def near_duplicates(
    features: Float[np.ndarray, "n d"], positions: Int64[np.ndarray, " k"], limit: float
) -> Bool[np.ndarray, " k"]:
    """Returns which of some samples have a cosine above the limit to one before them.

    Before: farther from the mean of them all, by cosine; of equal ones, that of the lower place in
    `positions`. One that has no near-duplicate but those left out is left out too.

    Args:
      features: Features of the whole data set.
      positions: Which are compared.
      limit: In (0, 1).
    Source: Abbas et al. 2023, SemDeDup, arXiv 2303.09540, all samples being one cluster.
    """
    units = _units("features", features, positions)
    # rounded, since the last digits depend on where a row is
    centrality = np.round(units @ units.mean(axis=0, dtype=np.float64), 6)
    order = np.argsort(centrality, kind="stable")
    num = len(units)
    block = min(padded_length(num), _BLOCK)
    padded = np.zeros((-(-padded_length(num) // block) * block, units.shape[1]), np.float32)
    padded[:num] = units[order]
    found = np.empty(num, bool)
    found[order] = np.asarray(_has_like_one_before(padded, limit, block=block))[:num]
    return found


def most_similar(
    features: Float[np.ndarray, "n d"],
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Returns the most similar other sample of each, and their cosine, in [-1, 1]; n is 2 or more.

    Of samples that are equally similar, the first counts. All pairs are compared.
    """
    num = len(features)
    units = _units("features", features, np.arange(num))
    others, cosines = np.empty(num, np.int64), np.empty(num, np.float32)
    for start in range(0, num, _BLOCK):
        own = np.arange(start, min(start + _BLOCK, num))
        found = np.clip(_products(units[own], units), -1, 1)
        found[np.arange(len(own)), own] = -np.inf
        others[own], cosines[own] = found.argmax(axis=1), found.max(axis=1)
    return others, cosines


@functools.partial(jax.jit, static_argnames="block")
def _has_like_one_before(
    units: Float32[Array, "n d"], limit: Float32[Array, ""] | float, *, block: int
) -> Bool[Array, " n"]:
    """Returns whether the cosine of each row and one before it is above the limit."""
    places = jnp.arange(len(units))

    def of_block(own: Int[Array, " b"]) -> Bool[Array, " b"]:
        return ((_products(units[own], units) > limit) & (places < own[:, None])).any(axis=1)

    return jax.lax.map(of_block, places.reshape(-1, block)).ravel()


def _units(
    name: str, rows: Float[np.ndarray, "n d"], positions: Int64[np.ndarray, " k"]
) -> Float32[np.ndarray, "k d"]:
    """Returns some rows, brought to length 1."""
    wide = rows[positions].astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    if not largest.all():
        raise expect.InputError(
            f"{name}: the row at position {positions[np.argmin(largest)]} is 0, so that it has no "
            "direction; expected another one."
        )
    wide /= largest  # squares of very large or small numbers are lost
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


@jax.jit
def _products(a: Float32[Array, "a d"], b: Float32[Array, "b d"]) -> Float32[Array, "a b"]:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
