"""What a network in training says of samples, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dlc_jax.distributed import fetch, mesh_of, place_rows
from dlc_jax.preprocess import filled
from dlc_jax.training.images.step import Network, TrainState


def over_batches(
    program: Callable[[Network, TrainState, jax.Array], Any],
    network: Network,
    state: TrainState,
    batches: Iterable[Shaped[np.ndarray, "b ..."]],
    batch_size: int,
) -> list[Shaped[np.ndarray, "n ..."]]:
    """Returns on the host what a program gives of all samples, an array for each of its outputs.

    Args:
      program: `predicted_classes` or `outputs_of_batch`.
      network, state: What it takes besides.
      batches: Samples; each batch is filled up, and placed on the devices that the network is on.
      batch_size: Samples of every call.
    """
    parts, mesh = [], mesh_of(state.trained)
    for some in batches:
        full = filled(some, batch_size)
        placed = jnp.asarray(full) if mesh is None else place_rows(mesh, full)
        found = jax.tree.leaves(program(network, state, placed))
        parts.append([fetch(leaf)[: len(some)] for leaf in found])
    return [np.concatenate(output) for output in zip(*parts, strict=True)]
