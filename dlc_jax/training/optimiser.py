"""torch.optim.SGD and MultiStepLR in optax, and the order in which an epoch sees its samples."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Int64

from dlc_jax.types import Conventions


def epoch_order(
    positions: Int64[np.ndarray, " k"], seed: int, epoch: int
) -> Int64[np.ndarray, " k"]:
    """Returns the positions in the order in which an epoch trains on them; epochs count from 1."""
    return np.random.default_rng([seed, epoch]).permutation(positions)


class Sgd(NamedTuple):
    """Constants of torch.optim.SGD without dampening: weight decay is L2 in the gradient.

    Compiled programs are specialised to them.

    Attributes:
      momentum: In [0, 1).
      weight_decay: Times the parameter, added to its gradient before momentum.
      nesterov: Whether a step looks ahead along the new momentum.
    """

    momentum: float
    weight_decay: float
    nesterov: bool = False

    @classmethod
    def of(cls, settings: Any) -> Sgd:
        """Returns the constants in the settings of a run or of linear probes."""
        return cls(settings.momentum, settings.weight_decay, settings.nesterov)

    def at(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """Returns the optimiser with this learning rate, a number or a schedule over steps."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(learning_rate, momentum=self.momentum or None, nesterov=self.nesterov),
        )


def learning_rates(settings: Any, conventions: Conventions) -> list[float]:
    """Returns the learning rate of every epoch, as torch's MultiStepLR steps it.

    Args:
      settings: Has the number of `epochs`, the `learning_rate` before the first milestone, and
        `milestones`, fractions of the epochs; after each the rate is divided by ten.
      conventions: Whether milestone times epochs is floored (25 and 37 of 50). Otherwise one that
        is no whole number (37.5) never comes, as in the released code (Q6).
    """
    epochs, learning_rate = settings.epochs, float(settings.learning_rate)
    passed = [milestone * epochs for milestone in settings.milestones]
    if conventions.floors_milestones:  # rounded first, since 0.29 x 100 is 28.999999999999996
        passed = [math.floor(round(value, 9)) for value in passed]
    # two milestones in one epoch divide twice, and one at epoch 0 does so from the start: as torch
    times = collections.Counter(passed)
    rates = []
    for epoch in range(epochs):
        learning_rate *= 0.1 ** times[epoch]
        rates.append(learning_rate)
    return rates
