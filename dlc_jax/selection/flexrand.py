"""FlexRand: easy and hard pools of a class, drawn from at random."""

from __future__ import annotations

import zlib

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
    ranked = group.positions
    pool, num_easy, num_hard = budgets(len(ranked), draw.keep_fraction, draw.split)
    lots = Lots(ranked, draw, "flexrand")
    return np.concatenate(
        [lots.first(ranked[:pool], num_easy), lots.first(ranked[pool:], num_hard)]
    )


class Lots:
    """A lot for every sample of a group, which (seed, label, purpose) and its place decide.

    Its place among the group's samples in the data set, not its rank: where two scores differ a
    little, what is drawn from one sample's pool differs only where that sample does.
    """

    def __init__(self, positions: Positions, draw: Draw, purpose: str):
        generator = np.random.default_rng([draw.seed, draw.label, zlib.crc32(purpose.encode())])
        self._positions = np.sort(positions)
        self._lots = np.argsort(generator.permutation(len(positions)))

    def first(self, pool: Positions, num: int) -> Positions:
        """Returns the `num` samples of a pool whose lots are lowest."""
        lots = self._lots[np.searchsorted(self._positions, pool)]
        return pool[np.argsort(lots)[:num]]
