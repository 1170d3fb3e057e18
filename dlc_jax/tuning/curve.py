"""How much can be dropped: accuracy against the keep fraction, and the smallest one that does."""

from __future__ import annotations

from typing import NamedTuple

from dlc_jax import expect
from dlc_jax.tuning.settings import TuningConfig
from dlc_jax.types import Tried, Tuning


class KeepCurve(NamedTuple):
    """Validation accuracy against the keep fraction.

    Attributes:
      rows: One per keep fraction, ascending; `accuracy` in percent, `to_full` with its interval.
      full_accuracy: Accuracy of training on everything.
      tolerance: Points that may be lost.
      smallest: The smallest keep fraction from which on no more than that is lost on average; 1
        where the largest one loses more.
      surely: The same with the lower end of the 95 % interval in place of the average.
    """

    rows: tuple[Tried, ...]
    full_accuracy: float
    tolerance: float
    smallest: float
    surely: float


def keep_curve(
    tuning: Tuning, *, method: str = "auto", tolerance: float = TuningConfig.tolerance
) -> KeepCurve:
    """Returns what a method loses by keeping less, and the smallest keep fraction that will do.

    Args:
      tuning: From `tune`.
      method: `auto` for the choice at each keep fraction, `flexrand` for its chosen split, or
        another method that was tried.
      tolerance: Percentage points that may be lost against training on everything.
    Raises:
      ValueError: a method that was not tried, or a tolerance below 0.
    Example:
      >>> labels = np.repeat([0, 1], 50)
      >>> features = np.eye(2, dtype=np.float32)[labels]
      >>> scores = np.linspace(0, 1, 100, dtype=np.float32)
      >>> tuning = dlc.tune(
      ...     scores, labels, features=features, methods=("easiest",), keep_fractions=(0.2, 0.5)
      ... )
      >>> dlc.keep_curve(tuning).smallest
      0.2
    """
    expect.at_least("tolerance", tolerance, 0)
    if method in ("auto", "flexrand"):
        choices = tuning.methods if method == "auto" else tuning.splits
        rows = tuple(tuning.row(*choice[:3]) for choice in choices)
    else:
        rows = tuple(row for row in tuning.tried if row.method == method)
    if not rows:
        names = dict.fromkeys(row.method for row in tuning.tried)
        raise expect.InputError(
            f"method: {method!r} was not tried; tried: auto, {', '.join(names)}."
        )
    means = [row.to_full.mean for row in rows]
    lowest = [row.to_full.mean - row.to_full.half_width for row in rows]
    smallest, surely = (_smallest(rows, gaps, tolerance) for gaps in (means, lowest))
    return KeepCurve(rows, tuning.full_accuracy, tolerance, smallest, surely)


def _smallest(rows: tuple[Tried, ...], gaps: list[float], tolerance: float) -> float:
    """From it on all larger ones are within the tolerance, so that a lucky one does not count."""
    smallest = 1.0
    for row, gap in reversed(list(zip(rows, gaps, strict=True))):
        if gap < -tolerance:
            break
        smallest = row.keep_fraction
    return smallest
