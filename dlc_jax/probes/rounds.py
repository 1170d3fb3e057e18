"""The losses of a whole path, or, with `num_probes="auto"`, of as many probes as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from dlc_jax import checks
from dlc_jax.masking import AUTO, PathSpec, refinements
from dlc_jax.probes.certificate import certify
from dlc_jax.probes.path import LearningPath
from dlc_jax.types import ProbeLosses
from dlc_jax.workspace.keys import json_hash

Measure = Callable[[LearningPath, str], Float32[np.ndarray, "k n"]]


def measured_path(
    spec: PathSpec,
    path: LearningPath,
    measure: Measure,
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
      measure: Gives the losses of some of its probes, and keeps them under names with this suffix.
      labels: Classes within which samples are ranked.
      ids: Sample ids.
      samples: What else `ProbeLosses` has of the samples.
    Raises:
      ValueError: losses that are not finite.
    """

    def found(of: LearningPath, losses: Float32[np.ndarray, "k n"]) -> ProbeLosses:
        checks.losses_are_finite(losses, ids)
        return ProbeLosses(
            losses, of.sparsity, labels, ids, steps=of.steps, num_steps=of.num_steps, **samples
        )

    if spec.num_probes != AUTO:
        return found(path, measure(path, ""))
    rows: dict[int, Float32[np.ndarray, " n"]] = {}
    for steps in refinements(path.num_steps):
        missing = path.only(steps[~np.isin(steps, list(rows))])
        new = missing.steps.tolist()
        rows |= dict(zip(new, measure(missing, f"-{json_hash(new)[:8]}"), strict=True))
        probes = found(path.only(steps), np.stack([rows[step] for step in steps.tolist()]))
        if len(steps) == path.num_steps or certify(probes).spearman.low >= spec.agreement:
            break
    return probes
