"""Differences in accuracy with intervals, where both what is trained and what is tested on vary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

from dlc_jax.types import Gap

CONFIDENCE = 0.95
_ROUNDING = 1e-20  # variance, in points, of equal differences


class ChancePart(NamedTuple):
    """What one source of chance adds to the variance of a mean, and its degrees of freedom."""

    variance: float
    freedom: int

    @classmethod
    def of_mean(cls, values: Float64[np.ndarray, " k"]) -> ChancePart:
        """Returns the part of values that vary independently; 0 of a single one."""
        if len(values) < 2:
            return cls(0.0, 0)
        return cls(float(values.var(ddof=1)) / len(values), len(values) - 1)


def interval(
    mean: float,
    of_samples: ChancePart,
    of_runs: ChancePart,
    both: float = 0.0,
    most_freedom: float = math.inf,
) -> Gap:
    """Returns a mean that varies with the samples it is over and with the runs.

    The parts are estimated each as if the other source of chance were not there, so that what
    varies with both is in either; it is counted once. Degrees of freedom are Satterthwaite's.

    Args:
      mean: In points.
      of_samples, of_runs: Variance of the means over runs of each sample, and over samples of each
        run.
      both: Variance that is in both parts.
      most_freedom: Degrees of freedom that are not exceeded; few make tails heavy.
    Returns:
      A p-value of 1, where there is no variance: no noise was seen, to be beyond.
    Source: Satterthwaite 1946; Hillis 2007, multi-reader studies of many cases.
    """
    from scipy import stats  # a third of a second, which only tuning and reports need

    total = of_samples.variance + max(of_runs.variance - both, 0.0)
    if total < _ROUNDING:
        return Gap(mean, 0.0, 1.0)
    parts = [part for part in (of_samples, of_runs) if part.freedom]
    freedom = total**2 / sum(part.variance**2 / part.freedom for part in parts)
    freedom = min(freedom, most_freedom)
    error = math.sqrt(total)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Gap(mean, quantile * error, float(stats.t.sf(mean / error, freedom)))


def crossed(values: Float64[np.ndarray, "r n"]) -> Gap:
    """Returns the mean of what each of r runs showed on the same n samples, in the values' unit.

    It speaks of new runs and new samples. Of one run, of new samples alone.
    """
    values = np.asarray(values, np.float64)
    num_runs, num_samples = values.shape
    runs, samples, mean = values.mean(axis=1), values.mean(axis=0), float(values.mean())
    both = 0.0
    if min(values.shape) > 1:
        left = values - runs[:, None] - samples + mean
        freedom = (num_runs - 1) * (num_samples - 1)
        both = float(np.square(left).sum()) / freedom / values.size
    return interval(mean, ChancePart.of_mean(samples), ChancePart.of_mean(runs), both)


class HeldOut(NamedTuple):
    """Which samples were held out when; each at most once in a partition of the data.

    Attributes:
      repeat: [p, n] the repeat in which a sample was held out, by partition; -1: in none.
      num_repeats: r.
    """

    repeat: Int64[np.ndarray, "p n"]
    num_repeats: int

    def means(self, values: Shaped[np.ndarray, "p n"]) -> Float64[np.ndarray, " _"]:
        """Returns the mean over repeats of each sample that was held out at all."""
        seen = self.repeat >= 0
        times = seen.sum(axis=0)
        return (values * seen).sum(axis=0, dtype=np.float64)[times > 0] / times[times > 0]


def mean_accuracy(right: Bool[np.ndarray, "p n"], held_out: HeldOut) -> float:
    """Returns the mean over held-out samples, in percent."""
    return float(100 * held_out.means(right).mean())


def gap(difference: Float[np.ndarray, "p n"], held_out: HeldOut) -> Gap:
    """Returns how much better one way of choosing is than another.

    Two things are random: which samples there are to validate on, and what was drawn and trained
    in a repeat; see `interval`. It speaks of this training set, of new samples and new seeds.

    Args:
      difference: Points by sample while it was held out: 100 where the one is right and the other
        wrong, -100 the other way round, or a mean of such.
      held_out: When that was.
    Returns:
      In percentage points; half the width of the 95 % interval is infinite for one repeat. The
      p-value is 1 for one repeat, and where all differences are equal.
    """
    means = held_out.means(difference)
    if held_out.num_repeats < 2:
        return Gap(float(means.mean()), math.inf, 1.0)
    seen = held_out.repeat >= 0
    repeats, values = held_out.repeat[seen], difference[seen]
    sizes = np.bincount(repeats, minlength=held_out.num_repeats)
    of_repeats = np.bincount(repeats, values, minlength=len(sizes)) / sizes
    freedom = max(len(values) - len(sizes), 1)
    within = np.square(values - of_repeats[repeats]).sum() / freedom / len(values)
    return interval(
        float(means.mean()),
        ChancePart.of_mean(means),
        ChancePart.of_mean(of_repeats),
        float(within),
        # p-values of many ways are asked for, where Satterthwaite's tails are too light
        most_freedom=held_out.num_repeats - 1,
    )


def over_splits(values: Float64[np.ndarray, " k"], test_to_train: float) -> Gap:
    """Returns the mean over random splits of one data set, of which training sets overlap.

    Args:
      values: One per split.
      test_to_train: Ratio of the numbers of samples in the two parts of a split.
    Source: Nadeau & Bengio 2003, Inference for the generalization error.
    """
    values = np.asarray(values, np.float64)
    part = ChancePart.of_mean(values)
    wider = part._replace(variance=part.variance * (1 + len(values) * test_to_train))
    return interval(float(values.mean()), ChancePart(0.0, 0), wider)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p_values, kind="stable")
    steps = [p_values[place] * (len(order) - rank) for rank, place in enumerate(order)]
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


_DRAWS = 20_000


def of_many(p_values: Sequence[float], likeness: Float64[np.ndarray, "k k"]) -> list[float]:
    """Returns one-sided p-values corrected for how many comparisons there are, and how alike.

    Each becomes how likely the best of all is so good where none is better. What is compared with
    one and the same reference shares its noise, so that this is less than their number times it.

    Args:
      p_values: Those of each comparison alone.
      likeness: Correlations of the comparisons.
    Source: Dunnett 1955, by simulation of normal deviates.
    """
    from scipy import stats

    deviates = np.random.default_rng(0).multivariate_normal(
        np.zeros(len(p_values)), likeness, _DRAWS, check_valid="ignore", method="eigh"
    )
    highest = np.sort(deviates.max(axis=1))
    found = stats.norm.isf(p_values)
    return (1 - np.searchsorted(highest, found, side="left") / _DRAWS).tolist()


def likeness_of(differences: Float32[np.ndarray, "k n"]) -> Float64[np.ndarray, "k k"]:
    """Returns correlations; one that never varies is like no other."""
    centred = differences - differences.mean(axis=1, keepdims=True)
    size = np.linalg.norm(centred, axis=1)
    centred /= np.where(size, size, 1)[:, None]
    found = (centred @ centred.T).astype(np.float64)
    np.fill_diagonal(found, 1.0)
    return found


def two_sided(
    values: Float64[np.ndarray, "*k"], test: Callable[[Float64[np.ndarray, "*k"]], Gap]
) -> float:
    """Returns how likely a mean so far from 0, on either side, is where it is 0.

    Args:
      values: What the mean is of.
      test: Returns it with its one-sided p-value.
    """
    found = test(values)
    return min(2 * (found if found.mean >= 0 else test(-values)).p_value, 1.0)
