"""The masked networks of one run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int, Int64

from dlc_jax.encoders import Encoder
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.masking import (
    Importance,
    PathSpec,
    Thresholds,
    exact_thresholds,
    prunable_paths,
    removal_steps,
    weight_importance,
)
from dlc_jax.types import Conventions, by_path


class LearningPath(NamedTuple):
    """Masks of growing sparsity, each a threshold on the importance of weights.

    Attributes:
      prunable: Paths of the leaves that are masked.
      importance: Importance of their weights, on the device.
      thresholds: [m] threshold of each probe.
      sparsity: [m] share of the prunable weights that each probe zeroes.
      steps: [m] which steps of the whole path the probes are.
      num_steps: All that it has.
    """

    prunable: tuple[str, ...]
    importance: Importance
    thresholds: Thresholds
    sparsity: Float32[np.ndarray, " m"]
    steps: Int64[np.ndarray, " m"]
    num_steps: int

    def __len__(self) -> int:
        return len(self.sparsity)

    def thresholds_at(self, places: Int[np.ndarray, " k"]) -> Thresholds:
        """Returns the thresholds of the probes at these places, which may repeat."""
        return Thresholds(*(part[places] for part in self.thresholds))

    def only(self, steps: Int64[np.ndarray, " k"]) -> LearningPath:
        """Returns the path with these of its steps as probes."""
        rows = np.searchsorted(self.steps, steps)
        thresholds = self.thresholds_at(rows)
        return LearningPath(
            self.prunable, self.importance, thresholds, self.sparsity[rows], steps, self.num_steps
        )


def learning_path(
    encoder: Encoder | LanguageModel, path: PathSpec, seed: int, conventions: Conventions
) -> LearningPath:
    """Returns the probes of a path whose schedule is decided; the seed is of random masking."""
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[name].size for name in prunable)
    found = path.counts(num_weights)
    if conventions.ties_as_torch and path.masking == "l1":
        order = encoder.module_order
        in_order = prunable if order is None else tuple(sorted(prunable, key=order))
        importance = removal_steps(encoder.params, in_order, found.grid)
    else:
        importance = weight_importance(encoder.params, prunable, path.masking, seed)
    thresholds = exact_thresholds(encoder.params, prunable, importance, found.chosen)
    if importance is not None:  # where the weights are that it belongs to
        importance = {
            name: jax.device_put(value, getattr(leaves[name], "sharding", None))
            for name, value in importance.items()
        }
    sparsity = (found.chosen / num_weights).astype(np.float32)
    return LearningPath(
        prunable, importance, thresholds, sparsity, found.steps, num_steps=len(found.grid)
    )
