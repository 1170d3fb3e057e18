"""`num_probes="auto"`: more probes until their ranking is that of all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int32

from dlc_jax.masking import refinements
from dlc_jax.probes.certificate import certify_losses
from dlc_jax.probes.path import LearningPath

Measure = Callable[[LearningPath], Float32[np.ndarray, "k n"]]


def until_it_ranks(
    path: LearningPath, measure: Measure, labels: Int32[np.ndarray, " n"], agreement: float
) -> tuple[LearningPath, Float32[np.ndarray, "m n"]]:
    """Measures 5, 15, 45, ... probes of the path, each time only those that are missing.

    Args:
      path: All of it.
      measure: Gives the losses of some of its probes.
      labels: Classes within which samples are ranked.
      agreement: Ends where Spearman's correlation with the ranking by all is at least this with
        97.5 % probability; and where all are measured.
    Returns:
      The path with the probes that it took, and their losses.
    """
    rows: dict[int, Float32[np.ndarray, " n"]] = {}
    for steps in refinements(path.num_steps):
        missing = path.only(steps[~np.isin(steps, list(rows))])
        rows |= dict(zip(missing.steps.tolist(), measure(missing), strict=True))
        used, losses = path.only(steps), np.stack([rows[step] for step in steps.tolist()])
        if len(used) == path.num_steps:
            break
        if certify_losses(losses, labels, used.steps, path.num_steps).spearman.low >= agreement:
            break
    return used, losses
