"""Selections by the distances of samples to the means of classes, their prototypes."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dlc_jax.selection.geometry import placed
from dlc_jax.selection.methods import Draw, Group, Positions, budget
from dlc_jax.selection.neighbours import squared_distances


class Distances(NamedTuple):
    """How far the samples of a group are from the means of classes over the whole data set.

    Attributes:
      own: [n] Euclidean distance to the mean of a sample's own class.
      other: [n] to the nearest mean of another class; infinite where there is none.
    """

    own: Float64[np.ndarray, " n"]
    other: Float64[np.ndarray, " n"]

    @property
    def misses(self) -> Bool[np.ndarray, " n"]:
        """Whether another class is nearer."""
        return self.other < self.own


def distances(group: Group, name: str) -> Distances:
    """Returns distances in the space of an input."""
    group = dataclasses.replace(group, inputs=(name,))
    means, labels = group.known.class_means(name), group.known.labels
    of_class = np.searchsorted(np.unique(labels), labels[group.positions])
    # around the mean of all and in units of the farthest, so that few digits are lost
    rows, means = placed(group, means.mean(axis=0), means)
    own, other = np.empty(len(rows)), np.empty(len(rows))
    for here, squares in squared_distances(rows, means):
        places = np.arange(len(here)), of_class[here]
        own[here] = squares[places]
        squares[places] = np.inf
        other[here] = squares.min(axis=1)
    return Distances(np.sqrt(own), np.sqrt(other))


def prototypes(group: Group, draw: Draw) -> Positions:
    """Returns the samples that are most clearly of their class, by the prototypes.

    Clear is a low ratio of the distances to a sample's own class mean and to the nearest other;
    where there is one class, a low distance. Equal ones are ordered by position.

    Source: the margin of the nearest-mean classifier, Snell et al. 2017, Prototypical networks.
    """
    own, other = distances(group, group.inputs[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(own == other, 1.0, own / other)
    return group.positions[np.lexsort((own, ratio))[: budget(group, draw)]]


_LEAST_RANK_WEIGHT, _STEEPNESS, _MIDDLE = 0.2, 1.0, 0.5  # alpha, k and the fraction between


def ram_apl(group: Group, draw: Draw) -> Positions:
    """Returns the samples near the mean of their class, and nearest to it, by several encoders.

    Lowest first: w times the mean over encoders of the rank of a sample's distance to the mean of
    its class, in [0, 1), plus 1 - w times the share of encoders for which another class's mean is
    nearer. w = 0.2 + 0.8 / (1 + exp(f - 0.5)) for the keep fraction f. Encoders are that of
    `features` and, where they are given, of `second_features`. Equal ones are ordered by position.

    Source: Wan et al. 2025, Foundation model insights (RAM-APL), arXiv 2506.14473.
    """
    found = [distances(group, name) for name in group.inputs]
    num = len(group.positions)
    ranks = np.mean([_ranks(of.own) / num for of in found], axis=0)
    missed = np.mean([of.misses for of in found], axis=0)
    slope = 1 / (1 + math.exp(_STEEPNESS * (draw.keep_fraction - _MIDDLE)))
    weight = _LEAST_RANK_WEIGHT + (1 - _LEAST_RANK_WEIGHT) * slope
    order = np.argsort(weight * ranks + (1 - weight) * missed, kind="stable")
    return group.positions[order[: budget(group, draw)]]


def _ranks(values: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns ranks from 0; of equal values the first has the lower one."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
