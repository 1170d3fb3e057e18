"""FlexRand: easy and hard pools of a class, drawn from at random."""

from __future__ import annotations

import zlib
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64

Ranked: TypeAlias = Int64[np.ndarray, " _"]  # positions of one class's samples, easiest first


def fractions(keep_fraction: float, split: float) -> tuple[float, float]:
    """Returns the easy and the hard share of a class, which add up to `keep_fraction`."""
    if split <= 0.5:
        easy = min(split, keep_fraction / 2)
        return easy, keep_fraction - easy
    hard = min(1 - split, keep_fraction / 2)
    return keep_fraction - hard, hard


def budgets(num_samples: int, keep_fraction: float, split: float) -> tuple[int, int, int]:
    """Returns the easy pool's size, and how many to draw from the easy and from the hard pool.

    The draws add up to round(num_samples keep_fraction), half to even, and fit their pools.
    """
    total = round(num_samples * keep_fraction)
    pool = round(num_samples * split)
    easy_share, _ = fractions(keep_fraction, split)
    hard = min(max(total - round(num_samples * easy_share), 0), num_samples - pool)
    return pool, total - hard, hard


def flexrand(
    ranked: Ranked, keep_fraction: float, split: float | None, seed: int, label: int
) -> Ranked:
    """Draws from the easy and the hard pool of a class, without replacement.

    Source: Jiang et al. 2025, section 4.
    """
    assert split is not None
    pool, num_easy, num_hard = budgets(len(ranked), keep_fraction, split)
    easy = shuffled(ranked[:pool], seed, label, "easy")[:num_easy]
    hard = shuffled(ranked[pool:], seed, label, "hard")[:num_hard]
    return np.concatenate([easy, hard])


def shuffled(positions: Ranked, seed: int, label: int, purpose: str) -> Ranked:
    """Returns the positions in an order that (seed, label, purpose) alone decides."""
    generator = np.random.default_rng([seed, label, zlib.crc32(purpose.encode())])
    return generator.permutation(positions)
