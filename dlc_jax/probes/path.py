"""The masked networks of one run, and which of them are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, Shaped

from dlc_jax import expect, masking
from dlc_jax.encoders import Encoder
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.probes.certificate import certify
from dlc_jax.types import Conventions, ProbeLosses, by_path
from dlc_jax.workspace.artefacts import json_hash


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
    importance: masking.Importance
    thresholds: masking.Thresholds
    sparsity: Float32[np.ndarray, " m"]
    steps: Int64[np.ndarray, " m"]
    num_steps: int

    def __len__(self) -> int:
        return len(self.sparsity)

    def thresholds_at(self, places: Int[np.ndarray, " k"]) -> masking.Thresholds:
        """Returns the thresholds of the probes at these places, which may repeat."""
        return masking.Thresholds(*(part[places] for part in self.thresholds))

    def only(self, steps: Int64[np.ndarray, " k"]) -> LearningPath:
        """Returns the path with these of its steps as probes."""
        rows = np.searchsorted(self.steps, steps)
        thresholds = self.thresholds_at(rows)
        return LearningPath(  # `_replace` would ask for the tuple's length
            self.prunable, self.importance, thresholds, self.sparsity[rows], steps, self.num_steps
        )


def learning_path(
    encoder: Encoder | LanguageModel, path: masking.PathSpec, seed: int, conventions: Conventions
) -> LearningPath:
    """Returns the probes of a path whose schedule is decided; the seed is of random masking."""
    prunable = masking.prunable_paths(encoder.params, encoder.is_prunable, encoder.module_order)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[name].size for name in prunable)
    found = path.counts(num_weights)
    importance: masking.Importance
    if conventions.ties_as_torch and path.masking == "l1":
        importance = masking.removal_steps(encoder.params, prunable, found.grid)
    else:
        importance = masking.weight_importance(encoder.params, prunable, path.masking, seed)
    thresholds = masking.exact_thresholds(encoder.params, prunable, importance, found.chosen)
    if importance is not None:  # where the weights are that it belongs to
        importance = {
            name: jax.device_put(value, getattr(leaves[name], "sharding", None))
            for name, value in importance.items()
        }
    sparsity = (found.chosen / num_weights).astype(np.float32)
    return LearningPath(
        prunable, importance, thresholds, sparsity, found.steps, num_steps=len(found.grid)
    )


def measured_path(
    spec: masking.PathSpec,
    path: LearningPath,
    measure: Callable[[LearningPath, str], Mapping[str, Shaped[np.ndarray, "k n"]]],
    *,
    labels: Int32[np.ndarray, " n"],
    ids: np.ndarray,
    **samples: Any,
) -> ProbeLosses:
    """Measures the probes of a path.

    With `num_probes="auto"` these are 5, 15, 45, ... of them, each time only those that are
    missing, until Spearman's correlation with the ranking by all is at least `spec.agreement` with
    97.5 % probability; or until all are measured.

    Args:
      spec: What the path was made by.
      path: All of it.
      measure: Gives the losses of some of its probes, and what else `ProbeLosses` has of them, by
        name; keeps them under names with this suffix.
      labels: Classes within which samples are ranked.
      ids: Sample ids.
      samples: What else `ProbeLosses` has of the samples.
    Raises:
      ValueError: losses that are not finite.
    """

    def found(of: LearningPath, measured: Mapping[str, np.ndarray]) -> ProbeLosses:
        expect.losses_are_finite(measured["losses"], ids)
        of_probes = {"sparsity": of.sparsity, "steps": of.steps, "num_steps": of.num_steps}
        return ProbeLosses(**{**measured, **of_probes, **samples}, labels=labels, ids=ids)

    if spec.num_probes != masking.AUTO:
        return found(path, measure(path, ""))
    rows: dict[str, dict[int, np.ndarray]] = {}  # [n] by name and step
    for steps in masking.refinements(path.num_steps):
        missing = path.only(steps[~np.isin(steps, list(rows.get("losses", ())))])
        new = missing.steps.tolist()
        for name, array in measure(missing, f"-{json_hash(new)[:8]}").items():
            rows.setdefault(name, {}).update(zip(new, array, strict=True))
        arrays = {name: np.stack([of[s] for s in steps.tolist()]) for name, of in rows.items()}
        probes = found(path.only(steps), arrays)
        if len(steps) == path.num_steps or certify(probes).spearman.low >= spec.agreement:
            break
    return probes
