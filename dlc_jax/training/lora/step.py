"""The compiled programs of LoRA fine-tuning: gradients of some rows, a step of the optimiser."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dlc_jax.encoders.architecture import Architecture, joined
from dlc_jax.training.lora.batches import TokenRows
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.optimiser import torch_sgd
from dlc_jax.types import Params, path_name


class Optimiser(NamedTuple):
    """Constants of the optimiser."""

    name: str
    momentum: float
    weight_decay: float

    @classmethod
    def of(cls, settings: LoraConfig) -> Optimiser:
        return cls(settings.optimiser, settings.momentum, settings.weight_decay)

    def at(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """torch.optim.SGD or torch.optim.AdamW, with its defaults for what is not a setting."""
        if self.name == "adamw":
            return optax.adamw(learning_rate, weight_decay=self.weight_decay)
        return torch_sgd(learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)


class LoraState(NamedTuple):
    """All that a step changes.

    Attributes:
      adapter: lora_a and lora_b of every changed projection, float32, nested as the decoder is.
      optimiser: Its state.
    """

    adapter: Params
    optimiser: optax.OptState


def initial_adapter(architecture: Architecture, seed: int) -> Params:
    """Returns an adapter that changes nothing yet, as PEFT starts it.

    lora_a is uniform within 1 / sqrt(inputs), lora_b zero; (seed, path) decide every draw.
    """

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        if name.endswith("lora_b"):
            return np.zeros(leaf.shape, np.float32)
        bound = leaf.shape[0] ** -0.5
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return generator.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, architecture.abstract_adapter())


class Sums(NamedTuple):
    """Added up over the rows of a step.

    Attributes:
      gradients: Gradient of the summed loss, by parameter of the adapter.
      loss: Summed cross-entropy of all tokens that count, in nats.
    """

    gradients: Params
    loss: Float[Array, ""]

    @classmethod
    def zero(cls, adapter: Params) -> Sums:
        return cls(jax.tree.map(jnp.zeros_like, adapter), jnp.zeros(()))


@functools.partial(jax.jit, static_argnames="architecture", donate_argnames="sums")
def add_rows(
    architecture: Architecture, params: Params, adapter: Params, rows: TokenRows, sums: Sums
) -> Sums:
    """Adds loss and gradients of some rows.

    Args:
      architecture: With an adapter.
      params: Parameters of the frozen model.
      adapter: See `LoraState`.
      rows: Rows of the step.
      sums: Sums over its other rows.
    """

    tokens, segments, counts = map(jnp.asarray, rows)

    def loss_of(adapter: Params) -> Float[Array, ""]:
        whole = joined(params, adapter)
        hidden = architecture.hidden(whole, tokens, segments)
        of_token = architecture.cross_entropies(whole, hidden[:, :-1], tokens[:, 1:])
        return jnp.where(counts[:, 1:], of_token, 0).sum()

    loss, gradients = jax.value_and_grad(loss_of)(adapter)
    return Sums(jax.tree.map(jnp.add, sums.gradients, gradients), sums.loss + loss)


# the state is not donated: a checkpoint of it may still be on its way to disk
@functools.partial(jax.jit, static_argnames="optimiser")
def take_step(
    optimiser: Optimiser,
    state: LoraState,
    gradients: Params,
    num_tokens: Float[Array, ""],
    learning_rate: Float[Array, ""],
) -> LoraState:
    """Takes one step on the mean loss over all tokens that count in the step's samples.

    Args:
      optimiser: Constants of the optimiser.
      state: Where it stands.
      gradients: Gradient of the summed loss.
      num_tokens: Number of tokens that count.
      learning_rate: Learning rate of this step.
    """
    gradients = jax.tree.map(lambda gradient: gradient / num_tokens, gradients)
    updates, moved = optimiser.at(learning_rate).update(gradients, state.optimiser, state.adapter)
    return LoraState(optax.apply_updates(state.adapter, updates), moved)
