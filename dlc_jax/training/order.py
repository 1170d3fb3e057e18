"""The order in which an epoch sees its samples."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64


def epoch_order(
    positions: Int64[np.ndarray, " k"], seed: int, epoch: int
) -> Int64[np.ndarray, " k"]:
    """Returns the positions in the order in which an epoch trains on them; epochs count from 1."""
    return np.random.default_rng([seed, epoch]).permutation(positions)
