"""Losses along the path -> one hardness score per sample; higher is harder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from dlc_jax import checks
from dlc_jax.scores.dlc import dlc
from dlc_jax.types import ProbeLosses

__all__ = ["SCORES", "score"]

# name -> losses [m, n] -> scores [n]
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"dlc": dlc}


def score(probes: ProbeLosses | np.ndarray, *, method: str = "dlc") -> Float32[np.ndarray, " n"]:
    """Returns how hard each sample is to learn; higher is harder.

    Args:
      probes: What `probe` returned, or a bare matrix of losses [m, n] of your own.
      method: `dlc`, the mean loss along the path.
    Raises:
      ValueError: an unknown method, not a matrix, or losses that are not finite.
    """
    checks.one_of("score method", method, SCORES)
    losses = probes.losses if isinstance(probes, ProbeLosses) else np.asarray(probes)
    if losses.ndim != 2 or 0 in losses.shape:
        raise checks.InputError(f"losses: expected a matrix [m, n], got shape {losses.shape}.")
    ids = probes.ids if isinstance(probes, ProbeLosses) else np.arange(losses.shape[1])
    checks.losses_are_finite(losses, ids)
    return SCORES[method](losses)
