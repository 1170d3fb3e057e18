"""What a network in training says of samples, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from dlc_jax.preprocess import filled
from dlc_jax.training.step import Network, TrainState, outputs_of_batch, predicted_classes


def predictions(
    network: Network, state: TrainState, inputs: Shaped[np.ndarray, "n ..."], batch_size: int
) -> Int32[np.ndarray, " n"]:
    """Returns the class of highest logit of every sample."""
    parts = []
    for start in range(0, len(inputs), batch_size):
        some = inputs[start : start + batch_size]
        found = predicted_classes(network, state, filled(some, batch_size))
        parts.append(np.asarray(found)[: len(some)])
    return np.concatenate(parts).astype(np.int32)


def outputs(
    network: Network,
    state: TrainState,
    batches: Iterable[Shaped[np.ndarray, "b ..."]],
    batch_size: int,
) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, " n"]]:
    """Returns the logits of every sample, and the squared norm of the head's input."""
    logits, squared_norms = [], []
    for some in batches:
        found = outputs_of_batch(network, state, filled(some, batch_size))
        logits.append(np.asarray(found.logits)[: len(some)])
        squared_norms.append(np.asarray(found.squared_norms)[: len(some)])
    return np.concatenate(logits), np.concatenate(squared_norms)
