"""Distorting-based learning complexity."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32


def dlc(losses: Float[np.ndarray, "m n"]) -> Float32[np.ndarray, " n"]:
    """Returns the mean loss over the probes, in nats; summed in float64.

    Source: Jiang et al. 2025, section 3.
    """
    return losses.mean(axis=0, dtype=np.float64).astype(np.float32)
