"""What was tried on held-out training data, and what follows from it."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from dlc_jax import checks


def way(method: str, split: float | None) -> str:
    """Returns a method as tables and figures name it."""
    return method if split is None else f"{method} (split {split:g})"


class Gap(NamedTuple):
    """A difference in accuracy with what is known of it.

    Attributes:
      mean: In percentage points; positive is better.
      half_width: Half the width of the 95 % interval, in points.
      p_value: One-sided: how likely a gap so large is where there is none.
    """

    mean: float
    half_width: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"


class Tried(NamedTuple):
    """What a way of choosing came to on validation data at a keep fraction.

    Attributes:
      accuracy: Validation accuracy in percent.
      to_random: Gap to random pruning at the same keep fraction.
      to_full: Gap to training on everything.
      to_even: Gap to FlexRand at split 0.5; None for other methods.
    """

    keep_fraction: float
    method: str
    split: float | None
    accuracy: float
    to_random: Gap
    to_full: Gap
    to_even: Gap | None

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return way(self.method, self.split)


class Choice(NamedTuple):
    """What to do at a keep fraction.

    Attributes:
      method, split: What `auto` stands for.
      why: A sentence.
    """

    keep_fraction: float
    method: str
    split: float | None
    why: str

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return way(self.method, self.split)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` found on validation parts of the training data.

    Attributes:
      tried: Every way of choosing at every keep fraction.
      methods: What method "auto" stands for, one per keep fraction, ascending.
      splits: What split "auto" stands for, likewise.
      full_accuracy: Accuracy of training on everything, in percent.
      trained: `linear_probe` or `finetune`.
      num_repeats: Validation splits.
      min_per_class: Least samples that were to be kept of a class.
      scores_fingerprint: SHA-256 of the scores and labels it was made from.
      features_fingerprint: SHA-256 of the features; None where there were none.
      seconds: Time of everything.
    """

    tried: tuple[Tried, ...]
    methods: tuple[Choice, ...]
    splits: tuple[Choice, ...]
    full_accuracy: float
    trained: str
    num_repeats: int
    min_per_class: int
    scores_fingerprint: str
    features_fingerprint: str | None
    seconds: float

    def choice(self, keep_fraction: float, *, of: str = "methods") -> Choice:
        """Returns what to do at a keep fraction.

        Args:
          keep_fraction: One that was tuned.
          of: `methods`, or `splits` for FlexRand's alone.
        Raises:
          ValueError: it was not tuned.
        """
        choices: tuple[Choice, ...] = getattr(self, of)
        for choice in choices:
            if math.isclose(choice.keep_fraction, keep_fraction, abs_tol=1e-9):
                return choice
        if not choices:
            raise checks.InputError("split: 'auto' was not tuned; expected flexrand in methods.")
        tuned = ", ".join(f"{choice.keep_fraction:g}" for choice in choices)
        raise checks.InputError(
            f"keep_fraction: {keep_fraction!r} was not tuned; tuned are {tuned}. Give it to "
            "tune(..., keep_fractions=...)."
        )

    def row(self, keep_fraction: float, method: str, split: float | None) -> Tried:
        """Returns what a way of choosing came to; KeyError if it was not tried."""
        return {row[:3]: row for row in self.tried}[keep_fraction, method, split]
