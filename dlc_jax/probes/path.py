"""The masked networks of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int64

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
from dlc_jax.workspace.keys import json_hash


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

    def padded_to(self, chunk: int) -> Thresholds:
        """Returns thresholds of a multiple of `chunk` probes, the last one repeated."""
        num = len(self)
        places = np.minimum(np.arange(-(-num // chunk) * chunk), num - 1)
        return Thresholds(*(part[places] for part in self.thresholds))

    @property
    def name(self) -> str:
        """Name of these probes among others of the path."""
        return json_hash(self.steps.tolist())[:8]

    def only(self, steps: Int64[np.ndarray, " k"]) -> LearningPath:
        """Returns the path with these of its steps as probes."""
        rows = np.searchsorted(self.steps, steps)
        thresholds = Thresholds(*(part[rows] for part in self.thresholds))
        return LearningPath(
            self.prunable,
            self.importance,
            thresholds,
            self.sparsity[rows],
            self.steps[rows],
            self.num_steps,
        )

    def repeated(self, k: int, times: int) -> Thresholds:
        """Returns the threshold of probe k alone, so many times."""
        return Thresholds(*(part[[k] * times] for part in self.thresholds))


def learning_path(
    encoder: Encoder | LanguageModel, path: PathSpec, seed: int, conventions: Conventions
) -> LearningPath:
    """Returns the probes of a path whose schedule is decided; the seed is of random masking."""
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[name].size for name in prunable)
    found = path.counts(num_weights)
    if conventions.ties_as_torch and path.masking == "l1":
        in_order = prunable
        if encoder.module_order is not None:
            in_order = tuple(sorted(prunable, key=encoder.module_order))
        importance = removal_steps(encoder.params, in_order, found.grid)
    else:
        importance = weight_importance(encoder.params, prunable, path.masking, seed)
    thresholds = exact_thresholds(encoder.params, prunable, importance, found.chosen)
    return LearningPath(
        prunable,
        _beside(importance, leaves),
        thresholds,
        sparsity=(found.chosen / num_weights).astype(np.float32),
        steps=found.steps,
        num_steps=len(found.grid),
    )


def _beside(importance: Importance, leaves: Mapping[str, Any]) -> Importance:
    """Puts importances where the weights are that they belong to."""
    if importance is None:
        return None
    return {
        path: jax.device_put(value, getattr(leaves[path], "sharding", None))
        for path, value in importance.items()
    }
