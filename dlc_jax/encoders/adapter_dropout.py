"""Dropout of what low-rank changes read, as PEFT's `lora_dropout`, with draws of JAX's own.

Each token has a key of its own, so that what is drawn does not depend on the row or the program
call that the token is in. The frozen layers read everything.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from dlc_jax import expect

Keys = UInt32[Array, "b t 2"]  # of every token


class StepId(NamedTuple):
    """What the draws of a step hang on, besides samples, layers and positions.

    Attributes:
      seed: Seed of the run.
      epoch: From 1.
      number: Steps before it in the epoch.
    """

    seed: int
    epoch: int
    number: int


def keys_of_sample(step: StepId, sample: int, length: int) -> UInt32[np.ndarray, "t 2"]:
    """Returns the keys of a sample's tokens in a step; `sample` is its position in the data."""
    first, second = np.random.SeedSequence([*step, sample]).generate_state(2)
    return np.stack([np.full(length, first), second + np.arange(length, dtype=np.uint32)], axis=1)


def kept(keys: Keys, layer: str, rate: float, num_features: int) -> Bool[Array, "b t d"]:
    """Returns which inputs of a layer's change stay: each with a probability of 1 - rate.

    Args:
      keys: From `keys_of_sample`.
      layer: Path of the layer, since layers draw apart.
      rate: In [0, 1).
      num_features: Inputs of the layer.
    """

    def of_token(key: Array) -> Array:
        # other kinds of keys do not draw for each by itself
        typed = jax.random.wrap_key_data(key, impl="threefry2x32")
        typed = jax.random.fold_in(typed, np.uint32(zlib.crc32(layer.encode())))
        return jax.random.bernoulli(typed, 1 - rate, (num_features,))

    return jax.vmap(jax.vmap(of_token))(keys)


def dropped(
    x: Float[Array, "*b d"], *, keys: Keys, layer: str, rate: float
) -> Float[Array, "*b d"]:
    """Returns what the change of a layer reads in training: zeros, or values over 1 - rate.

    Raises:
      ValueError: the layer does not read one vector per token.
    """
    rows_of_tokens, (num_rows, length) = x.shape[:-1], keys.shape[:2]
    if rows_of_tokens not in ((num_rows, length), (num_rows * length,)):
        raise expect.InputError(
            f"lora.dropout: {rate}, but {layer} reads an array {list(x.shape)} of {num_rows} x "
            f"{length} tokens; expected 0, or lora.targets without this layer."
        )
    return jnp.where(kept(keys, layer, rate, x.shape[-1]).reshape(x.shape), x / (1 - rate), 0)
