"""What a network in training says of samples, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Shaped

from dlc_jax.distributed import fetch, mesh_of, place_rows
from dlc_jax.preprocess import filled
from dlc_jax.training.images.step import Network, TrainState, outputs_of_batch, predicted_classes


def predictions(
    network: Network, state: TrainState, inputs: Shaped[np.ndarray, "n ..."], batch_size: int
) -> Int32[np.ndarray, " n"]:
    """Returns the class of highest logit of every sample."""
    parts = []
    for start in range(0, len(inputs), batch_size):
        some = inputs[start : start + batch_size]
        found = predicted_classes(network, state, _placed(state, some, batch_size))
        parts.append(fetch(found)[: len(some)])
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
        found = outputs_of_batch(network, state, _placed(state, some, batch_size))
        logits.append(fetch(found.logits)[: len(some)])
        squared_norms.append(fetch(found.squared_norms)[: len(some)])
    return np.concatenate(logits), np.concatenate(squared_norms)


def _placed(state: TrainState, rows: Shaped[np.ndarray, "r ..."], batch_size: int) -> jax.Array:
    """Returns a full batch on the devices that the network is on."""
    mesh = mesh_of(state.trained)
    full = filled(rows, batch_size)
    return jnp.asarray(full) if mesh is None else place_rows(mesh, full)
