"""How far the ranking by the probes used is from that by more; `auto` adds probes until it is near.

Along the path the loss of a sample is a smooth curve with small wiggles. Centred within classes,
the curves are taken for draws of one Gaussian process: fractional Brownian motion in a time that
runs as fast as the losses of all samples move between neighbouring probes. Its Hurst exponent is
the likeliest one given these losses. What the process says of the losses between the probes used
gives the distribution of the mean over more probes, and draws from that the rankings it may lead
to. Nothing is measured for it. Source: Mandelbrot and Van Ness 1968, doi 10.1137/1010093.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from dlc_jax import expect
from dlc_jax.types import KEEP_FRACTIONS, ProbeLosses

_EXPONENTS = np.linspace(0.5, 0.95, 10).tolist()  # 0.5: increments do not depend on each other
_EXPONENT = 0.75  # of two probes, which cannot tell; measured: 0.7 to 0.85
_SMOOTHER = 0.5  # of the logarithm of deviations; measured, see docs/log/speed.md
_NUM_SAMPLES = 20_000  # of large sets, so many are looked at
_FINER = 4  # of a whole path, the comparison is with so many times the probes
Ranks = Int64[np.ndarray, " n"]


class Interval(NamedTuple):
    """An estimate, and where the truth lies with the probability `RankCertificate.level`."""

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class RankCertificate:
    """How a score from some probes is expected to agree with that from more.

    Attributes:
      num_probes: m, the probes used.
      num_compared: Probes of the score it is compared with: all steps of the path, or, where all
        were used, three more between any two.
      level: Probability with which each interval holds the truth.
      spearman: Rank correlation within classes, pooled over them; 1 is the same ranking.
      easiest, hardest: Keep fraction -> share of the kept set of that method that both scores keep.
        FlexRand's pools at split g agree as the easiest at keep fraction g do.
    """

    num_probes: int
    num_compared: int
    level: float
    spearman: Interval
    easiest: dict[float, Interval]
    hardest: dict[float, Interval]

    def to_dict(self) -> dict[str, object]:
        """Returns what JSON can hold; keep fractions as `0.30`."""
        found = dataclasses.asdict(self) | {"spearman": self.spearman._asdict()}
        for method in ("easiest", "hardest"):
            of = found[method].items()
            found[method] = {f"{share:.2f}": some._asdict() for share, some in of}
        return found

    def __str__(self) -> str:
        middle = min(self.easiest, key=lambda share: abs(share - 0.5))
        return (
            f"{self.num_probes} probes rank as {self.num_compared} would: Spearman "
            f"{_said(self.spearman)}, of the {middle:.0%} easiest {_said(self.easiest[middle])} "
            f"the same ({self.level:.0%} intervals)"
        )


def certify(
    probes: ProbeLosses,
    *,
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
    level: float = 0.95,
    num_draws: int = 200,
    seed: int = 0,
) -> RankCertificate:
    """Estimates how the ranking by these probes agrees with the ranking by more of the same path.

    Args:
      probes: From `probe` or `probe_responses`, of two probes or more.
      keep_fractions: Keep fractions of the kept sets that are compared, each in (0, 1).
      level: Level of the intervals, in (0, 1).
      num_draws: Rankings drawn.
      seed: Seed of the draws, and of the choice of samples where there are more than 20,000.
    Raises:
      ValueError: one probe, losses that do not say where on the path they are, or a value out of
        range.
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 15))
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> path = dlc.PathSpec(num_probes=8, placement="midpoint")
      >>> certificate = dlc.certify(dlc.probe(encoder, dataset, image_size=32, path=path))
      >>> certificate.num_probes, certificate.num_compared, certificate.spearman.low > 0.9
      (8, 50, True)
    """
    if probes.steps is None or probes.num_steps is None:
        raise expect.InputError(
            "rank certificate: these losses do not tell steps and num_steps, their places on the "
            "path; expected what dlc.probe or dlc.probe_responses returns."
        )
    if len(probes.losses) < 2:
        raise expect.InputError("rank certificate: needs two probes or more, got 1.")
    expect.losses_are_finite(probes.losses, probes.ids)
    shares = [("keep_fractions", fraction) for fraction in keep_fractions]
    for name, value in [*shares, ("level", level)]:
        expect.at_least(name, value, 0, exclusive=True)
        expect.at_most(name, value, 1, exclusive=True)
    expect.at_least("num_draws", num_draws, 1)
    generator = np.random.default_rng(seed)
    chosen = _some_samples(probes.labels, generator)
    classes = _Classes.of_labels(probes.labels[chosen])
    curves = classes.centred(probes.losses[:, chosen].astype(np.float64))
    used = probes.steps.astype(np.float64)
    finer = _FINER if len(used) == probes.num_steps else 1
    compared = np.arange((probes.num_steps - 1) * finer + 1) / finer
    expected, deviation = _mean_over(compared, used, curves)
    scores = curves.mean(axis=0)
    ranking = classes.ranks(scores)
    # a volatility known from m - 1 gaps is uncertain itself; and rough curves are ruled out by what
    # was measured, but smoother ones than such motions are not
    known = 1 / np.sqrt(2 * (len(used) - 1))
    doubt = generator.normal(size=num_draws)
    doubt = np.exp(np.where(doubt > 0, known, np.hypot(known, _SMOOTHER)) * doubt)
    rows = []
    for factor in doubt:
        between = scores + generator.uniform() * (expected - scores)
        noise = generator.normal(size=len(expected))
        drawn = classes.ranks(between + factor * deviation * noise)
        rows.append(classes.agreement(ranking, drawn, keep_fractions))
    tail = (1 - level) / 2

    def interval(values: Sequence[float]) -> Interval:
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(float(np.median(values)), float(low), float(high))

    return RankCertificate(
        num_probes=len(used),
        num_compared=len(compared),
        level=level,
        spearman=interval([row.spearman for row in rows]),
        easiest={k: interval([row.easiest[k] for row in rows]) for k in keep_fractions},
        hardest={k: interval([row.hardest[k] for row in rows]) for k in keep_fractions},
    )


class Agreement(NamedTuple):
    """How two rankings agree.

    Attributes:
      spearman: Rank correlation within classes, pooled over them.
      easiest, hardest: Keep fraction -> share of the samples kept by one that the other keeps too.
    """

    spearman: float
    easiest: dict[float, float]
    hardest: dict[float, float]


def compare(
    scores: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
) -> Agreement:
    """Returns how two scores of the same samples agree, class by class."""
    classes = _Classes.of_labels(labels)
    return classes.agreement(classes.ranks(scores), classes.ranks(others), keep_fractions)


class _Classes(NamedTuple):
    """Samples by class.

    Attributes:
      of: [n] class, from 0 without gaps.
      starts: [n] how many samples the classes before a sample's have.
      sizes: [n] number of samples in a sample's class.
    """

    of: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    @classmethod
    def of_labels(cls, labels: Int[np.ndarray, " n"]) -> _Classes:
        of = np.unique(labels, return_inverse=True)[1]
        sizes = np.bincount(of)
        return cls(of, (np.cumsum(sizes) - sizes)[of], sizes[of])

    def centred(self, rows: Float64[np.ndarray, "m n"]) -> Float64[np.ndarray, "m n"]:
        """Returns rows without the means of classes, which do not rank within them."""
        return np.stack([row - np.bincount(self.of, row)[self.of] / self.sizes for row in rows])

    def ranks(self, values: Float[np.ndarray, " n"]) -> Ranks:
        """Returns the rank of each sample in its class, from 0; equal values by position."""
        ranks = np.empty(len(values), np.int64)
        ranks[np.lexsort((values, self.of))] = np.arange(len(values))
        return ranks - self.starts

    def agreement(self, ranks: Ranks, others: Ranks, keep_fractions: Sequence[float]) -> Agreement:
        """Returns how two rankings agree; 1 where no class has two samples, or nothing is kept."""
        middle = (self.sizes - 1) / 2
        squares = ((ranks - middle) ** 2).sum()
        products = ((ranks - middle) * (others - middle)).sum()
        easiest, hardest = {}, {}
        for share in keep_fractions:
            num = np.round(self.sizes * share).astype(np.int64)  # of a sample's class, half to even
            easiest[share] = _shared(ranks < num, others < num)
            rest = self.sizes - num
            hardest[share] = _shared(ranks >= rest, others >= rest)
        return Agreement(float(products / squares) if squares else 1.0, easiest, hardest)


def _some_samples(
    labels: Int[np.ndarray, " n"], generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Returns all samples; of large sets those of some whole classes, so that cuts stay the same.

    Classes are large enough alone where a random part of theirs is taken.
    """
    if len(labels) <= _NUM_SAMPLES:
        return np.arange(len(labels))
    sizes = np.bincount(labels)
    order = generator.permutation(np.flatnonzero(sizes))
    num = int(np.searchsorted(np.cumsum(sizes[order]), _NUM_SAMPLES)) + 1
    chosen = np.flatnonzero(np.isin(labels, order[:num]))
    if len(chosen) > 2 * _NUM_SAMPLES:
        chosen = np.sort(generator.choice(chosen, _NUM_SAMPLES, replace=False))
    return chosen


def _mean_over(
    compared: Float64[np.ndarray, " k"],
    used: Float64[np.ndarray, " m"],
    curves: Float64[np.ndarray, "m n"],
) -> tuple[Float64[np.ndarray, " n"], float]:
    """Returns the mean of each curve over other places than it was measured at.

    Args:
      compared: Places, in steps of the path.
      used: Places where the curves were measured, ascending.
      curves: Losses there.
    Returns:
      Its expectation, and the standard deviation that all curves have in common.
    """
    moved = np.diff(curves, axis=0)
    squares = (moved**2).mean(axis=1)
    if not squares.any():
        return curves.mean(axis=0), 0.0
    squares = np.maximum(squares, 1e-6 * squares.max())  # places of equal losses are no one place
    sample = moved @ moved.T / moved.shape[1]

    def times(places: Float64[np.ndarray, " k"], exponent: float) -> Float64[np.ndarray, " k"]:
        """Returns the process's time at places: 0 at the first one used, as fast as losses move."""
        passed = squares ** (1 / (2 * exponent))
        found = np.interp(places, used, np.concatenate([[0.0], np.cumsum(passed)]))
        before, after = np.minimum(places - used[0], 0), np.maximum(places - used[-1], 0)
        found += before * passed[0] / (used[1] - used[0])
        return found + after * passed[-1] / (used[-1] - used[-2])

    def surprise(exponent: float) -> float:
        """Returns how improbable these increments are under a Hurst exponent."""
        known = times(used, exponent)
        of_moves = np.diff(np.diff(_covariance(known, known, exponent), axis=0), axis=1)
        return float(np.linalg.slogdet(of_moves)[1] + np.trace(np.linalg.solve(of_moves, sample)))

    exponent = min(_EXPONENTS, key=surprise) if len(used) > 2 else _EXPONENT
    sought, known = times(compared, exponent), times(used, exponent)[1:]
    # of what was gained since the first probe, which is known
    of_mean = _covariance(sought, known, exponent).mean(axis=0)
    gain = of_mean @ np.linalg.inv(_covariance(known, known, exponent))
    variance = _covariance(sought, sought, exponent).mean() - gain @ of_mean
    return curves[0] + gain @ (curves[1:] - curves[0]), float(np.sqrt(max(variance, 0)))


def _covariance(
    times: Float64[np.ndarray, " k"], others: Float64[np.ndarray, " l"], exponent: float
) -> Float64[np.ndarray, "k l"]:
    """Returns that of fractional Brownian motion which is 0 at time 0."""
    apart = np.abs(times[:, None] - others)
    mine, theirs, both = (np.abs(t) ** (2 * exponent) for t in (times[:, None], others, apart))
    return 0.5 * (mine + theirs - both)


def _shared(kept: Bool[np.ndarray, " n"], others: Bool[np.ndarray, " n"]) -> float:
    """Returns the share of the kept that the other keeps too; 1 where nothing is kept."""
    num = kept.sum()
    return float((kept & others).sum() / num) if num else 1.0


def _said(found: Interval) -> str:
    return f"{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"
