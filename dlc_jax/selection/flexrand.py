"""FlexRand: easy and hard pools of a class, drawn from at random."""

from __future__ import annotations

import numpy as np

from dlc_jax.selection.group import Draw, Group, Positions


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


def flexrand(group: Group, draw: Draw) -> Positions:
    """Draws from the easy and the hard pool of a group, without replacement.

    Source: Jiang et al. 2025, section 4.
    """
    assert draw.split is not None
    num_samples = len(group.positions)
    pool, num_easy, num_hard = budgets(num_samples, draw.keep_fraction, draw.split)
    ranks = group.ranks_by_lot(draw, "flexrand")
    is_easy = ranks < pool
    easy, hard = np.flatnonzero(is_easy)[:num_easy], np.flatnonzero(~is_easy)[:num_hard]
    return group.positions[ranks[np.concatenate([easy, hard])]]
