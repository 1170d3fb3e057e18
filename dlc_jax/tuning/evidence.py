"""How sure a difference in validation accuracy is, from repeated validation splits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer

from dlc_jax.types import Gap

_CONFIDENCE = 0.95
_ROUNDING = 1e-24  # variance of equal differences of shares


class Outcomes(NamedTuple):
    """What one way of choosing a subset came to, over all repeats.

    Attributes:
      num_right: [n] how often each sample was classified right while it was held out.
      accuracy: [r] share of the held-out samples classified right, in each repeat.
    """

    num_right: Integer[np.ndarray, " n"]
    accuracy: Float[np.ndarray, " r"]


def mean_accuracy(outcomes: Outcomes, num_held_out: Integer[np.ndarray, " n"]) -> float:
    """Returns the mean over held-out samples, in percent.

    Args:
      outcomes: Results of one way of choosing.
      num_held_out: How often each sample was held out.
    """
    seen = num_held_out > 0  # at all
    return float(100 * (outcomes.num_right[seen] / num_held_out[seen]).mean())


def gap(one: Outcomes, other: Outcomes, num_held_out: Integer[np.ndarray, " n"]) -> Gap:
    """Returns how much better `one` is than `other`, paired by sample and by repeat.

    Two things are random: which samples there are to validate on, and what was drawn and trained
    in a repeat. The variance is the sum of both parts, each as if the other were not there: of
    the samples' mean differences over n, and of the repeats' differences over r. Student's t with
    r - 1 degrees of freedom. It speaks of this training set, of new samples and new seeds.

    Args:
      one, other: Results on the same repeats.
      num_held_out: How often each sample was held out.
    Returns:
      In percentage points; half the width of the 95 % interval is infinite for one repeat. The
      p-value is 1 for one repeat, and where all differences are equal.
    """
    from scipy import stats  # a third of a second, which only tuning and reports need

    seen = num_held_out > 0
    difference = (one.num_right[seen].astype(np.float64) - other.num_right[seen]) / num_held_out[
        seen
    ]
    repeats = one.accuracy - other.accuracy
    mean = float(difference.mean())
    if len(repeats) < 2:
        return Gap(100 * mean, math.inf, 1.0)
    variance = _variance_of_mean(difference) + _variance_of_mean(repeats)
    if variance < _ROUNDING:  # the same difference throughout, which shows no noise to be beyond
        return Gap(100 * mean, 0.0, 1.0)
    error, freedom = math.sqrt(variance), len(repeats) - 1
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, freedom))
    return Gap(100 * mean, 100 * quantile * error, float(stats.t.sf(mean / error, freedom)))


def _variance_of_mean(values: Float64[np.ndarray, " k"]) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0
