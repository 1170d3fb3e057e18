"""FlexRand as the released code runs it: one generator through all cells (method Q4, Q5)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.selection.flexrand import fractions
from dlc_jax.selection.group import Positions

_SPLIT_STEPS = 20  # 0.05 * i, i = 1..19
_BUDGET_STEPS = 10  # j / 10, j = 1..9


def grid_cell(keep_fraction: float, split: float) -> tuple[int, int]:
    """Returns (i, j) with split = 0.05 i and keep_fraction = j / 10.

    Raises:
      ValueError: the released code has no such cell.
    """
    return (
        _step("split", split, _SPLIT_STEPS, "0.05, 0.10, ..., 0.95"),
        _step("keep_fraction", keep_fraction, _BUDGET_STEPS, "0.1, 0.2, ..., 0.9"),
    )


def _step(name: str, value: float, num_steps: int, valid: str) -> int:
    step = round(value * num_steps) if 0 < value < 1 else 0
    if not (1 <= step < num_steps and abs(value - step / num_steps) < 1e-9):
        raise checks.InputError(f"{name}: mode 'official' has {valid} only, got {value!r}.")
    return step


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
    for i in range(1, _SPLIT_STEPS):
        for j in range(1, _BUDGET_STEPS):
            states[i, j] = generator.get_state()
            for size in sizes:
                pool, num_easy, num_hard = _draws(size, (i, j))
                generator.choice(pool, num_easy, replace=False)
                generator.choice(size - pool, num_hard, replace=False)
    return states
