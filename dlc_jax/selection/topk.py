"""Selections that need no pools: the easiest, the hardest, or any samples of a class."""

from __future__ import annotations

from dlc_jax.selection.flexrand import Ranked, shuffled


def easiest(
    ranked: Ranked, keep_fraction: float, split: float | None, seed: int, label: int
) -> Ranked:
    """Returns the round(n keep_fraction) samples of lowest score."""
    return ranked[: round(len(ranked) * keep_fraction)]


def hardest(
    ranked: Ranked, keep_fraction: float, split: float | None, seed: int, label: int
) -> Ranked:
    """Returns the round(n keep_fraction) samples of highest score."""
    return ranked[len(ranked) - round(len(ranked) * keep_fraction) :]


def random(
    ranked: Ranked, keep_fraction: float, split: float | None, seed: int, label: int
) -> Ranked:
    """Returns round(n keep_fraction) samples drawn without replacement, whatever their scores."""
    order = shuffled(sorted_positions(ranked), seed, label, "random")
    return order[: round(len(ranked) * keep_fraction)]


def sorted_positions(ranked: Ranked) -> Ranked:
    """Undoes the ranking, so that the draw does not depend on the scores."""
    ranked = ranked.copy()
    ranked.sort()
    return ranked
