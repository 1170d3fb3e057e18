"""Loss and accuracy of an epoch, and the alarm when a loss is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from dlc_jax import checks
from dlc_jax.distributed import fetch
from dlc_jax.training.images.progress import Open
from dlc_jax.training.images.step import StepMetrics, TrainState


class EpochMetrics:
    """Adds up the metrics of an epoch, two steps late, so that the device is never waited for.

    Attributes:
      learning_rate: Of the epoch.
      loss: Sum over samples, in nats; of earlier steps too.
      correct: Of every batch, whether each sample's highest logit was right, in training mode.
    """

    def __init__(
        self,
        learning_rate: float,
        steps_before: int,
        loss: float = 0.0,
        correct: Iterable[np.ndarray] = (),
    ):
        self.learning_rate = learning_rate
        self.loss = loss
        self.correct = list(correct)
        self._step = steps_before
        self._pending: list[tuple[StepMetrics, int]] = []

    def add(self, metrics: StepMetrics, num_real: int) -> None:
        self._pending.append((metrics, num_real))
        if len(self._pending) > 2:
            self._count()

    def count_all(self) -> None:
        """Waits for the steps that are under way."""
        while self._pending:
            self._count()

    def left_at(self, num_steps: int, elapsed_s: float) -> Open:
        """Returns what is added up after so many steps of the epoch."""
        self.count_all()
        right = "".join("1" if one else "0" for one in np.concatenate(self.correct))
        return Open(num_steps, self.loss, right, elapsed_s)

    def finish(self, state: TrainState) -> None:
        """Counts the rest, and looks at the weights that the last step left."""
        self.count_all()
        if not bool(fetch(_all_finite(state.trained))):
            self._stop("weights that are")

    def _count(self) -> None:
        metrics, num_real = self._pending.pop(0)
        self._step += 1
        loss = float(fetch(metrics.loss))
        if not np.isfinite(loss):
            self._stop(f"a loss ({loss}) that is")
        self.loss += loss * num_real
        self.correct.append(fetch(metrics.correct)[:num_real])

    def _stop(self, what: str) -> None:
        raise checks.SharedError(
            f"fine-tuning gave {what} not finite, at step {self._step}, learning rate "
            f"{self.learning_rate:g}; try a smaller finetune.learning_rate, such as a tenth of "
            "it, or, if that is bfloat16, finetune.dtype float32."
        )


@jax.jit
def _all_finite(tree: Any) -> Bool[jax.Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
