"""How samples are shared out: how many each class keeps, whatever the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from dlc_jax import expect
from dlc_jax.selection.group import Positions
from dlc_jax.selection.methods import AUTO, SELECTORS
from dlc_jax.types import Conventions, Selection


def proportional(
    members: list[Positions],
    scores: Shaped[np.ndarray, " n"] | None,
    keep_fraction: float,
    min_per_class: int,
) -> list[float]:
    """Returns the fraction to keep of each class: the same, but for the bounds.

    Args:
      members: Positions of each class's samples.
      scores: Not looked at.
      keep_fraction: Fraction kept of every class.
      min_per_class: Least samples of a class, all of one that has no more. A class of one sample
        keeps it.
    """
    return [_fraction(len(positions), keep_fraction, min_per_class) for positions in members]


def _fraction(num_samples: int, keep_fraction: float, min_per_class: int) -> float:
    if num_samples == 1:  # rounding would lose the class
        return 1.0
    least = min(min_per_class, num_samples)
    return keep_fraction if round(num_samples * keep_fraction) >= least else least / num_samples


def nucs(
    members: list[Positions],
    scores: Shaped[np.ndarray, " n"] | None,
    keep_fraction: float,
    min_per_class: int,
) -> list[float]:
    """Returns the fraction to keep of each class, more of a class that is harder.

    As many samples in all as `proportional` keeps. A class's share is proportional to its size
    times its mean score, scores below its 5th and above its 95th percentile counting as these.
    Largest remainders are rounded up. No class keeps more than it has or fewer than `min_per_class`
    (or its only sample); what that leaves over or takes is shared among the others by the same
    rule. Where every score is 0, shares are proportional to size.

    Args:
      members, keep_fraction, min_per_class: As in `proportional`.
      scores: [n] zero or more.
    Raises:
      ValueError: a score is negative, so that it gives no share.
    Source: Zhang et al. 2025, Non-uniform class-wise coreset selection.
    """
    assert scores is not None
    if scores.min() < 0:
        raise expect.InputError(
            "scores: allocation 'nucs' shares out by mean score, expected none below 0, got "
            f"{scores.min()} at position {scores.argmin()}."
        )
    sizes = np.array([len(positions) for positions in members])
    least = np.where(sizes == 1, 1, np.minimum(min_per_class, sizes))
    fractions = proportional(members, scores, keep_fraction, min_per_class)
    total = sum(round(n * share) for n, share in zip(sizes.tolist(), fractions, strict=True))
    weights = sizes * np.array([_winsorised_mean(scores[positions]) for positions in members])
    return (shares(total, weights, least, sizes) / sizes).tolist()


def _winsorised_mean(scores: Shaped[np.ndarray, " _"]) -> float:
    scores = scores.astype(np.float64)
    return float(np.clip(scores, *np.percentile(scores, [5, 95])).mean())


def shares(
    total: int,
    weights: Float64[np.ndarray, " c"],
    least: Int64[np.ndarray, " c"],
    most: Int64[np.ndarray, " c"],
) -> Int64[np.ndarray, " c"]:
    """Splits `total` in proportion to weights, within bounds, by largest remainder.

    Bounds that the shares break become shares, on the side that is broken by more in all, and the
    rest is split anew, as often as needed. Equal remainders go to the first.

    Args:
      total: At least the sum of `least`, at most that of `most`.
      weights: Zero or more; where the rest has none, it is split in proportion to `most`.
    """
    exact, free = np.zeros(len(weights)), np.ones(len(weights), bool)
    while free.any():
        own = weights if weights[free].sum() > 0 else most
        exact[free] = (total - exact[~free].sum()) * (own[free] / own[free].sum())
        bounded = np.clip(exact, least, most)
        too_low = (bounded - exact).sum() >= 0
        broken = free & (bounded > exact if too_low else bounded < exact)
        if not broken.any():
            break
        exact[broken] = bounded[broken]
        free &= ~broken
    floors = np.floor(exact).astype(np.int64)
    remainders = np.where(free, exact - floors, -1.0)
    floors[np.argsort(-remainders, kind="stable")[: total - floors.sum()]] += 1
    return floors


ALLOCATIONS: Mapping[
    str, Callable[[list[Positions], np.ndarray | None, float, int], list[float]]
] = {"proportional": proportional, "nucs": nucs}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the samples of a cell are shared out among classes, and the variant of its method.

    Attributes:
      variant: `published`; `deepcore` copies that library's slip: `herding` takes the farthest
        sample, and with per_class=False `least_confidence`, `entropy` and `margin` keep the least
        uncertain.
      allocation: `proportional`: the fraction of each class. `nucs`: as many in all, but more of
        classes whose scores are higher. Not in `official`.
      per_class: False: round(n keep_fraction) out of all samples, whatever their classes, which may
        lose some; min_per_class must be 0. Not in `official`.
      min_per_class: Least samples kept of a class, all of a class that has no more; a class that
        this raises is selected from as at the keep fraction that gives as many. Not in `official`.

    Example: `dlc.select(scores, labels, keep_fraction=0.1, rules=dlc.Rules(min_per_class=1))`.
    """

    variant: str = Selection.variant
    allocation: str = Selection.allocation
    per_class: bool = Selection.per_class
    min_per_class: int = Selection.min_per_class

    def check(self, method: str, conventions: Conventions, where: str = "") -> None:
        """Raises ValueError unless the method, the conventions and the rules fit each other.

        Args:
          method: A method, or `auto`.
          conventions: What `mode` decides.
          where: Before the name of a number, in messages: `selection.` for a configuration's.
        """
        name = f"{where}min_per_class"
        expect.integer(name, self.min_per_class, 0)
        if self.min_per_class and conventions.draws_as_released:
            raise expect.InputError(
                f"{name}: mode {conventions.mode!r} has none, expected 0, got "
                f"{self.min_per_class!r}."
            )
        known = (Rules.variant,) if method == AUTO else SELECTORS[method].variants
        expect.one_of(f"variant of method {method!r}", self.variant, known)
        expect.one_of("allocation", self.allocation, ALLOCATIONS)
        if conventions.draws_as_released and not self._are_of_each_class:
            raise expect.InputError(
                f"mode {conventions.mode!r} has allocation='proportional' and per_class=True only, "
                f"got {self.allocation!r} and {self.per_class}."
            )
        if not self.per_class and (self.allocation != Rules.allocation or self.min_per_class):
            raise expect.InputError(
                "per_class=False: allocation and min_per_class are about classes, expected "
                f"'proportional' and 0, got {self.allocation!r} and {self.min_per_class}."
            )

    def check_tunable(self) -> None:
        """Raises ValueError unless samples are shared out as `tune` does it."""
        if not self._are_of_each_class:
            raise expect.InputError(
                f"{AUTO}: is tuned with allocation='proportional' and per_class=True, got "
                f"{self.allocation!r} and {self.per_class}."
            )

    @property
    def _are_of_each_class(self) -> bool:
        """Whether the same fraction is kept of every class."""
        return self.per_class and self.allocation == Rules.allocation
