"""The selectors by name, what each takes, and whether what is asked of one can be had."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dlc_jax import checks
from dlc_jax.selection import flexrand, geometry, official, strata, topk
from dlc_jax.selection.group import Draw, Group, Positions
from dlc_jax.types import Conventions

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
        functools.partial(checks.features_fit_labels, "features"), "dlc.features(...)"
    ),
    "probabilities": Input(
        checks.probabilities_fit_labels, "dlc.record_training(...)", of="training"
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
    "flexrand": Method(flexrand.flexrand, has_split=True),
    "easiest": Method(topk.easiest),
    "hardest": Method(topk.hardest),
    "random": Method(topk.random, needs="nothing"),
    "ccs": Method(strata.ccs),
    "moderate": Method(geometry.moderate, needs="features"),
    "herding": Method(geometry.herding, needs="features", variants=VARIANTS),
    "k_center_greedy": Method(geometry.k_center_greedy, needs="features"),
    "contextual_diversity": Method(geometry.contextual_diversity, needs="probabilities"),
    "least_confidence": Method(topk.most_uncertain, variants=VARIANTS, score="least_confidence"),
    "entropy": Method(topk.most_uncertain, variants=VARIANTS, score="entropy"),
    "margin": Method(topk.most_uncertain, variants=VARIANTS, score="margin"),
    "forgetting": Method(topk.hardest, score="forgetting"),
    "grand": Method(topk.hardest, score="grand"),
    "el2n": Method(topk.hardest, score="el2n"),
}


def has_split(method: str) -> bool:
    """Whether a method, or `auto`, takes FlexRand's gamma."""
    return method != AUTO and SELECTORS[method].has_split


def check_split(split: float | str, name: str = "split") -> None:
    """Raises ValueError unless the split is `auto` or in (0, 1)."""
    if not isinstance(split, str):
        checks.split(split, name)
    elif split != AUTO:
        raise checks.InputError(f"{name}: expected numbers or {AUTO!r}, got {split!r}.")


def check_cell(cell: Cell, conventions: Conventions) -> float | str | None:
    """Returns the split to use (None for methods without one), or raises ValueError."""
    method, keep_fraction, split, seed = cell
    checks.one_of("selection method", method, [*SELECTORS, AUTO])
    checks.keep_fraction(keep_fraction)
    checks.seed(seed)
    if isinstance(split, str):
        check_split(split)
    if AUTO in (method, split) and conventions.draws_as_released:
        raise checks.InputError(
            f"mode {conventions.mode!r} has no {AUTO!r}; expected a method and a split."
        )
    if conventions.draws_as_released and not isinstance(split, str):
        official.grid_cell(keep_fraction, DEFAULT_SPLIT if split is None else split)
    if not has_split(method):
        if split is not None:
            raise checks.InputError(f"split: method {method!r} takes none, got {split!r}.")
        return None
    split = DEFAULT_SPLIT if split is None else split
    check_split(split)
    return split
