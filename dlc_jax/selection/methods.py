"""The selectors by name, what each takes, and those that use ranks or chance alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

from dlc_jax import expect
from dlc_jax.selection import geometry
from dlc_jax.selection.group import Draw, Group, Positions, budget
from dlc_jax.types import Conventions


def easiest(group: Group, draw: Draw) -> Positions:
    """Returns the samples of lowest score."""
    return group.positions[: budget(group, draw)]


def hardest(group: Group, draw: Draw) -> Positions:
    """Returns the samples of highest score."""
    return group.positions[len(group.positions) - budget(group, draw) :]


def most_uncertain(group: Group, draw: Draw) -> Positions:
    """Returns the samples of highest score, the score being a classifier's uncertainty.

    Variant `deepcore`: DeepCore's unbalanced path sorts the wrong way round, so the samples of
    lowest score where the group is not a class.

    Source: Coleman et al. 2020, Selection via Proxy; DeepCore, methods/uncertainty.py.
    """
    if draw.variant == "deepcore" and not draw.per_class:
        return easiest(group, draw)
    return hardest(group, draw)


def random(group: Group, draw: Draw) -> Positions:
    """Returns samples drawn without replacement."""
    return group.positions[group.ranks_by_lot(draw, "random")[: budget(group, draw)]]


_SHARE_DROPPED = 0.1  # beta, of the hardest
_NUM_STRATA = 50


def ccs(group: Group, draw: Draw) -> Positions:
    """Drops the hardest tenth of the group and draws evenly over the score range of the rest.

    floor(n / 10) samples are dropped, or fewer where the budget leaves fewer to drop. The range of
    the rest is cut into 50 strata of equal width; where all scores are equal, into one.

    Source: Zheng et al. 2023, Coverage-centric coreset selection for high pruning rates, alg. 1.
    """
    assert group.scores is not None
    num_samples, num_kept = len(group.positions), budget(group, draw)
    num_dropped = min(int(num_samples * _SHARE_DROPPED), num_samples - num_kept)
    rest = group.positions[: num_samples - num_dropped]
    strata = _strata(group.scores[rest])
    sizes = np.bincount(strata, minlength=_NUM_STRATA)
    ranks = group.ranks_by_lot(draw, "ccs")
    ranks = ranks[ranks < len(rest)]
    by_lot = strata[ranks]
    called = [
        np.flatnonzero(by_lot == k)[:num] for k, num in enumerate(even_budgets(sizes, num_kept))
    ]
    return rest[ranks[np.concatenate(called)]]


def _strata(scores: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns the stratum of each score, 0 for the easiest; the highest score is in the last."""
    scores = scores.astype(np.float64)
    inner = np.linspace(scores.min(), scores.max(), _NUM_STRATA + 1)[1:-1]
    if inner[0] == inner[-1]:
        return np.zeros(len(scores), np.int64)
    return np.searchsorted(inner, scores, side="right")


def even_budgets(sizes: Int64[np.ndarray, " s"], total: int) -> list[int]:
    """Splits `total` evenly, smallest stratum first; what one cannot give, the later ones do.

    The budgets add up to `total` exactly wherever the sizes do to as much.
    """
    budgets = [0] * len(sizes)
    for done, k in enumerate(np.argsort(sizes, kind="stable").tolist()):
        budgets[k] = min(int(sizes[k]), total // (len(sizes) - done))
        total -= budgets[k]
    return budgets


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
        raise expect.InputError(f"{name}: mode 'official' has {valid} only, got {value!r}.")
    return step


def flexrand_as_released(
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


AUTO = "auto"  # a method, or a split: what tuning found best
DEFAULT_METHOD, DEFAULT_SPLIT = "flexrand", 0.5
FULL = "full"  # no method: the run on all samples, which others are compared with


class Cell(NamedTuple):
    """One selection, or the training run on it; split is None where the method has none."""

    method: str
    keep_fraction: float
    split: float | str | None
    seed: int

    @property
    def name(self) -> str:
        """`flexrand/keep_0.30-split_0.50-seed_1`: where its files lie below a stage's folder."""
        parts = [f"keep_{_two_decimals(self.keep_fraction)}"]
        if self.split is not None:
            split = self.split if isinstance(self.split, str) else _two_decimals(self.split)
            parts.append(f"split_{split}")
        return f"{self.method}/{'-'.join([*parts, f'seed_{self.seed}'])}"


def _two_decimals(value: float) -> str:
    """Two decimals where they say it all, more where they are needed: names must not collide."""
    return f"{value:.2f}" if round(value, 2) == value else repr(value)


class Input(NamedTuple):
    """An array [n, d] that some methods need instead of scores.

    Attributes:
      check: Raises ValueError unless the array fits labels [n].
      source: Call that returns it, for messages.
      of: Source in the stage `score`: `encoder`, or a record of `training`.
    """

    check: Callable[[np.ndarray, np.ndarray], None]
    source: str
    of: str = "encoder"


INPUTS: Mapping[str, Input] = {
    "features": Input(
        functools.partial(expect.features_fit_labels, "features"), "dlc.features(...)"
    ),
    "probabilities": Input(
        expect.probabilities_fit_labels, "dlc.record_training(...)", of="training"
    ),
}


class Method(NamedTuple):
    """A selector, and what it takes.

    Attributes:
      select: Picks from one class, or from all samples: returns `budget(group, draw)` different
        positions of the group, in any order.
      has_split: Whether it takes FlexRand's gamma.
      needs: What it needs: `nothing`, `scores`, or one of `INPUTS`.
      variants: The published definition, and others.
      score: Name of the score it is meant for; None: any score.
    """

    select: Callable[[Group, Draw], Positions]
    has_split: bool = False
    needs: str = "scores"
    variants: tuple[str, ...] = ("published",)
    score: str | None = None


VARIANTS = ("published", "deepcore")

SELECTORS: Mapping[str, Method] = {
    "flexrand": Method(flexrand, has_split=True),
    "easiest": Method(easiest),
    "hardest": Method(hardest),
    "random": Method(random, needs="nothing"),
    "ccs": Method(ccs),
    "moderate": Method(geometry.moderate, needs="features"),
    "herding": Method(geometry.herding, needs="features", variants=VARIANTS),
    "k_center_greedy": Method(geometry.k_center_greedy, needs="features"),
    "contextual_diversity": Method(geometry.contextual_diversity, needs="probabilities"),
    "least_confidence": Method(most_uncertain, variants=VARIANTS, score="least_confidence"),
    "entropy": Method(most_uncertain, variants=VARIANTS, score="entropy"),
    "margin": Method(most_uncertain, variants=VARIANTS, score="margin"),
    "forgetting": Method(hardest, score="forgetting"),
    "grand": Method(hardest, score="grand"),
    "el2n": Method(hardest, score="el2n"),
}


def has_split(method: str) -> bool:
    """Whether a method, or `auto`, takes FlexRand's gamma."""
    return method != AUTO and SELECTORS[method].has_split


def check_split(split: float | str, name: str = "split") -> None:
    """Raises ValueError unless the split is `auto` or in (0, 1)."""
    if not isinstance(split, str):
        expect.split(split, name)
    elif split != AUTO:
        raise expect.InputError(f"{name}: expected numbers or {AUTO!r}, got {split!r}.")


def check_cell(cell: Cell, conventions: Conventions) -> float | str | None:
    """Returns the split to use (None for methods without one), or raises ValueError."""
    method, keep_fraction, split, seed = cell
    expect.one_of("selection method", method, [*SELECTORS, AUTO])
    expect.keep_fraction(keep_fraction)
    expect.seed(seed)
    if isinstance(split, str):
        check_split(split)
    if AUTO in (method, split) and conventions.draws_as_released:
        raise expect.InputError(
            f"mode {conventions.mode!r} has no {AUTO!r}; expected a method and a split."
        )
    if conventions.draws_as_released and not isinstance(split, str):
        grid_cell(keep_fraction, DEFAULT_SPLIT if split is None else split)
    if not has_split(method):
        if split is not None:
            raise expect.InputError(f"split: method {method!r} takes none, got {split!r}.")
        return None
    split = DEFAULT_SPLIT if split is None else split
    check_split(split)
    return split
