"""FlexRand as the released code runs it: one generator through all cells (method Q4, Q5)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.selection.flexrand import fractions
from dlc_jax.selection.group import Positions

_NUM_SPLITS = 19  # 0.05 * i, i = 1..19
_NUM_BUDGETS = 9  # i / 10, i = 1..9


def grid_cell(keep_fraction: float, split: float) -> tuple[int, int]:
    """Returns (i, j) with split = 0.05 i and keep_fraction = j / 10.

    Raises:
      ValueError: the released code has no such cell.
    """
    i, j = round(split / 0.05), round(keep_fraction * 10)
    if not (1 <= i <= _NUM_SPLITS and abs(split - 0.05 * i) < 1e-9):
        raise checks.InputError(
            f"split: mode 'official' has 0.05, 0.10, ..., 0.95 only, got {split!r}."
        )
    if not (1 <= j <= _NUM_BUDGETS and abs(keep_fraction - j / 10) < 1e-9):
        raise checks.InputError(
            f"keep_fraction: mode 'official' has 0.1, 0.2, ..., 0.9 only, got {keep_fraction!r}."
        )
    return i, j


def flexrand(
    ranked: list[Positions], keep_fraction: float, split: float, seed: int
) -> list[Positions]:
    """Returns the kept positions of every class, each of which is ranked easiest first.

    The generator's state at a cell depends on the class sizes alone, so that a cell asked for by
    itself is the one at its place in the stream.

    Raises:
      ValueError: off the grid.
    """
    cell = grid_cell(keep_fraction, split)
    generator = np.random.RandomState()
    generator.set_state(_states(tuple(len(positions) for positions in ranked), seed)[cell])
    kept = []
    for positions in ranked:
        pool, num_easy, num_hard = _draws(len(positions), cell)
        easy = generator.choice(positions[:pool], num_easy, replace=False)
        hard = generator.choice(positions[pool:], num_hard, replace=False)
        kept.append(np.concatenate([easy, hard]))
    return kept


def _draws(num_samples: int, cell: tuple[int, int]) -> tuple[int, int, int]:
    split, keep_fraction = 0.05 * cell[0], cell[1] / 10
    easy, hard = fractions(keep_fraction, split)
    return round(num_samples * split), round(num_samples * easy), round(num_samples * hard)


@functools.lru_cache(maxsize=8)
def _states(sizes: tuple[int, ...], seed: int) -> dict[tuple[int, int], Any]:
    """Returns the generator's state before each cell."""
    generator = np.random.RandomState(seed)
    states = {}
    for i in range(1, _NUM_SPLITS + 1):
        for j in range(1, _NUM_BUDGETS + 1):
            states[i, j] = generator.get_state()
            for size in sizes:
                pool, num_easy, num_hard = _draws(size, (i, j))
                generator.choice(pool, num_easy, replace=False)
                generator.choice(size - pool, num_hard, replace=False)
    return states
