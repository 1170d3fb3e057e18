"""Selections by rank, or at random: the easiest, the hardest, or any samples."""

from __future__ import annotations

from dlc_jax.selection.group import Draw, Group, Positions, budget


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
