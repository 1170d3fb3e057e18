"""Selections by neighbours in feature space: density, coverage, and messages between neighbours.

All pairs of a group are compared, a block at a time: quadratic time, linear memory. Distances are
in float64 and rounded, so that copies of a sample are equally far from everything.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dlc_jax.selection.geometry import k_center_greedy, placed
from dlc_jax.selection.methods import Draw, Group, Positions, budget

_BLOCK = 512  # samples that are compared with all others at a time
_ROUNDING = 1e-11  # of squared norms; a difference of squared distances below it is none
_DIGITS = 10  # of cosines and gains
_WHOLE = 2048  # samples whose similarities to each other are all kept


class Neighbours(NamedTuple):
    """The nearest neighbours of each sample, nearest first, of equal ones that of lower place.

    Attributes:
      places: [n, k] in the group; no sample is its own neighbour.
      distances: [n, k] Euclidean.
    """

    places: Int64[np.ndarray, "n k"]
    distances: Float64[np.ndarray, "n k"]


def nearest(rows: Float64[np.ndarray, "n d"], num: int) -> Neighbours:
    """Returns `num` neighbours of each row, or all others where there are fewer."""
    num = min(num, len(rows) - 1)
    places = np.empty((len(rows), num), np.int64)
    squares = np.empty((len(rows), num))
    for own, found in squared_distances(rows, rows):
        found[np.arange(len(own)), own] = np.inf
        if num:
            farthest = np.partition(found, num - 1, axis=1)[:, num - 1]
            for place, row, limit in zip(own, found, farthest, strict=True):
                there = np.flatnonzero(row <= limit)
                places[place] = there[np.argsort(row[there], kind="stable")[:num]]
                squares[place] = row[places[place]]
    return Neighbours(places, np.sqrt(squares))


def squared_distances(
    rows: Float64[np.ndarray, "n d"], others: Float64[np.ndarray, "m d"]
) -> Iterator[tuple[Int64[np.ndarray, " b"], Float64[np.ndarray, "b m"]]]:
    """Yields places of some rows, and their squared distances to all others."""
    norms, other_norms = (np.square(some).sum(axis=1) for some in (rows, others))
    for start in range(0, len(rows), _BLOCK):
        own = np.arange(start, min(start + _BLOCK, len(rows)))
        both = norms[own, None] + other_norms
        unit = np.exp2(np.ceil(np.log2(np.maximum(_ROUNDING * both, np.finfo(float).tiny))))
        yield own, np.round(np.maximum(both - 2 * rows[own] @ others.T, 0) / unit) * unit


_MOST_CLUSTERS = 500
_SMALL = 5  # samples; the clusters of no more come last
_TYPICAL_OF = 20  # neighbours that a sample's typicality is measured by
_ITERATIONS = 20


def typical(group: Group, draw: Draw) -> Positions:
    """Returns the most typical samples of as many clusters as are kept, 500 at most.

    Typicality is 1 / the mean distance to the 20 nearest neighbours in the cluster, or to half of
    the cluster where that is fewer. Clusters take turns, the largest first; those of five samples
    or fewer come when the others have no more. k-means starts from what `k_center_greedy` takes
    first, so that nothing is drawn. Equal ones are ordered by position.

    Source: Hacohen et al. 2022, Active learning on a budget (TypiClust).
    """
    num = budget(group, draw)
    if not num:
        return group.positions[:0]
    rows = placed(group)[0]
    share = min(num, _MOST_CLUSTERS) / len(rows)
    first = k_center_greedy(group, draw._replace(keep_fraction=share))
    clusters = _clusters(rows, rows[np.isin(group.positions, first)])
    members = [np.flatnonzero(clusters == number) for number in np.unique(clusters)]
    turn = np.empty((len(rows), 2), np.int64)  # small clusters' later, then by round
    place = np.empty(len(rows), np.int64)  # within a round
    for rank, some in enumerate(sorted(members, key=len, reverse=True)):
        near = nearest(rows[some], min(_TYPICAL_OF, max(len(some) // 2, 1))).distances
        far = near.mean(axis=1) if near.size else np.zeros(len(some))
        turn[some[np.argsort(far, kind="stable")], 1] = np.arange(len(some))
        turn[some, 0], place[some] = len(some) <= _SMALL, rank
    return group.positions[np.lexsort((place, turn[:, 1], turn[:, 0]))[:num]]


def _clusters(
    rows: Float64[np.ndarray, "n d"], centres: Float64[np.ndarray, "k d"]
) -> Int64[np.ndarray, " n"]:
    """Returns the cluster of each row by k-means (Lloyd) from these centres; some may be empty."""
    clusters = np.full(len(rows), -1)
    for _ in range(_ITERATIONS):
        parts = [found.argmin(axis=1) for _, found in squared_distances(rows, centres)]
        before, clusters = clusters, np.concatenate(parts)
        if np.array_equal(before, clusters):
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, clusters, rows)
        sizes = np.bincount(clusters, minlength=len(centres))[:, None]
        centres = np.where(sizes, sums / np.maximum(sizes, 1), centres)
    return clusters


_COVERAGE = 0.6  # gamma


def subzerocore(group: Group, draw: Draw) -> Positions:
    """Greedily covers the group by typical samples: facility location weighted by density.

    Maximises the sum over all samples of the highest weight x cosine to a kept one. The weight is
    exp(-(r - mean r)^2 / (2 var r)) for the cosine distance r to the k-th nearest neighbour; k is
    the smallest for which samples drawn at random, as many as are kept, would be among the k
    neighbours of a sample with probability 0.6. A row of 0 has the cosine 0 to everything. Of equal
    gains that of higher weight is the first, of equal samples that of lower position.

    Source: Moser et al. 2025, SubZeroCore, arXiv 2509.21748.
    """
    num_samples, num = len(group.positions), budget(group, draw)
    directions = _directions(group)
    weights = _density_weights(directions, _neighbours_for_coverage(num_samples, num))
    return group.positions[_facility_location(directions, weights, num)]


def _directions(group: Group) -> Float64[np.ndarray, "n d"]:
    """Returns the group's rows at length 1, or 0."""
    rows = group.rows[group.positions].astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows /= np.where(largest, largest, 1)  # squares of very large or small numbers are lost
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)


def _neighbours_for_coverage(num_samples: int, num: int) -> int:
    """Returns the least k, 1 or more, at which a sample is likely enough to have a neighbour."""
    missed, k = 1.0, 0
    while 1 - missed < _COVERAGE and k < num_samples - num - 1:
        k += 1
        missed *= (num_samples - num - k) / (num_samples - k)
    return max(k, 1)


def _density_weights(directions: Float64[np.ndarray, "n d"], k: int) -> Float64[np.ndarray, " n"]:
    # of directions, the squared distance is twice the cosine distance
    distances = nearest(directions, k).distances
    radius = np.square(distances[:, -1]) / 2 if distances.size else np.zeros(len(directions))
    spread = np.ptp(radius)
    if spread < 10.0**-_DIGITS:
        return np.ones(len(radius))
    return np.exp(-np.square(radius - radius.mean()) / (2 * radius.var()))


def _facility_location(
    directions: Float64[np.ndarray, "n d"], weights: Float64[np.ndarray, " n"], num: int
) -> list[int]:
    """Returns places in the order in which the greedy algorithm takes them.

    A gain only falls while others are taken, so that a sample whose gain was computed since the
    last one was taken, and is the highest, is the next.
    """
    size = len(directions)
    cosines = directions @ directions.T if size <= _WHOLE else None

    def covered(place: int) -> Float64[np.ndarray, " n"]:
        own = directions @ directions[place] if cosines is None else cosines[place]
        return np.round(weights[place] * own, _DIGITS)

    # no cosine is below -1; what the closed form rounds must not be too low
    highest = size + weights * (directions @ directions.sum(axis=0)) + 1e-6 * size
    heap = [(-gain, -weights[place], place, -1) for place, gain in enumerate(highest.tolist())]
    heapq.heapify(heap)
    coverage, chosen = np.full(size, -1.0), list[int]()
    while len(chosen) < num:
        _, _, place, computed_at = heapq.heappop(heap)
        if computed_at == len(chosen):
            chosen.append(place)
            coverage = np.maximum(coverage, covered(place))
        else:
            gain = float(np.maximum(covered(place) - coverage, 0).sum())
            gain = round(gain, _DIGITS - 2)
            heapq.heappush(heap, (-gain, -weights[place], place, len(chosen)))
    return chosen


_NUM_NEIGHBOURS = 10


def d2(group: Group, draw: Draw) -> Positions:
    """Returns hard samples in dense regions, few of each region: messages between neighbours.

    A sample's value is its score, brought to [0, 1] over the group, plus those of its neighbours
    times exp(-d^2). Greedily, the sample of highest value is kept, and its value times exp(-d^2)
    is taken from each neighbour's. Neighbours are the 10 nearest of either; d is in units of the
    mean distance of neighbours, and where all scores are equal each counts as 1. Nothing is left
    out for being too hard. Of equal ones the easiest is the first. The authors' code has exp(-d) of
    the features as they are, a factor of its own for what is taken away, and leaves out some of the
    hardest first.

    Source: Maharana et al. 2024, D2 pruning, arXiv 2310.07931.
    """
    num, scores = budget(group, draw), group.known.scores
    assert scores is not None
    own = scores[group.positions].astype(np.float64)
    spread = np.ptp(own)
    own = (own - own.min()) / spread if spread else np.ones_like(own)
    near = nearest(placed(group)[0], _NUM_NEIGHBOURS)
    k = near.places.shape[1]
    pairs = np.stack([np.repeat(np.arange(len(own)), k), near.places.ravel()], axis=1)
    unit = near.distances.mean() if near.distances.any() else 1.0
    strength = np.exp(-np.square(near.distances.ravel() / unit))
    pairs, where = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0, return_index=True)
    strength = np.tile(strength, 2)[where]
    starts = np.searchsorted(pairs[:, 0], np.arange(len(own) + 1))
    values = own + np.bincount(pairs[:, 0], strength * own[pairs[:, 1]], minlength=len(own))
    chosen = []
    for _ in range(num):
        place = int(values.argmax())
        edges = slice(starts[place], starts[place + 1])
        values[pairs[edges, 1]] -= strength[edges] * values[place]
        values[place] = -np.inf
        chosen.append(place)
    return group.positions[chosen]
