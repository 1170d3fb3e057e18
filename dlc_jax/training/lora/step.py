"""The compiled programs of LoRA fine-tuning, and the rows that a step is fed."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, Int64, UInt32

from dlc_jax.encoders.adapter_dropout import StepId, keys_of_sample
from dlc_jax.encoders.causal_model import CausalModel, joined
from dlc_jax.preprocess.token_batches import bucket_length, make_rows, packed, placed
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.optimiser import Sgd
from dlc_jax.types import Params, path_name


class TokenRows(NamedTuple):
    """What a program call is fed.

    Attributes:
      tokens: Ids; 0 where there is none.
      segments: Number of the sample within its row, from 1; 0 at padding.
      counts: Whether the loss counts the token: something is before it, and it is of a response,
        unless `lora.loss_on` is `text`.
      keys: What dropout draws from; None: there is none.
    """

    tokens: Int32[np.ndarray, "b t"]
    segments: Int32[np.ndarray, "b t"]
    counts: Bool[np.ndarray, "b t"]
    keys: UInt32[np.ndarray, "b t 2"] | None = None


def rows_of_step(
    data: Tokenised,
    positions: Int64[np.ndarray, " k"],
    rows_at_once: int,
    max_length: int,
    *,
    packing: bool,
    loss_on: str = "response",
    drawing: StepId | None = None,
) -> Iterator[TokenRows]:
    """Yields the samples of a step, `rows_at_once` rows at a time, the longest first.

    Rows are padded to few lengths, so that programs are few; missing rows are all padding.

    Args:
      data: From `tokenise`.
      positions: Positions of the samples.
      rows_at_once: Rows of every call.
      max_length: Longest row in tokens.
      packing: Whether short samples share rows as long as the longest sample of the step.
      loss_on: See `LoraConfig`.
      drawing: The step, where it has dropout.
    """
    lengths = {int(i): len(data.tokens[i]) for i in positions}
    longest = max(lengths.values())
    if packing:
        room = bucket_length(longest, max_length)
        shared = packed(lengths, lambda _: room)[room]
    else:
        shared = [[i] for i in lengths]
    shared.sort(key=lambda row: -sum(lengths[i] for i in row))
    for start in range(0, len(shared), rows_at_once):
        some = shared[start : start + rows_at_once]
        length = bucket_length(sum(lengths[i] for i in some[0]), max_length)
        rows = _rows(data, some, rows_at_once, length, loss_on)
        yield rows if drawing is None else rows._replace(keys=_keys(data, some, rows, drawing))


def _rows(
    data: Tokenised, some: list[list[int]], num_rows: int, length: int, loss_on: str
) -> TokenRows:
    tokens, segments = make_rows(data, some, num_rows, length)
    counts = np.zeros((num_rows, length), bool)
    for row, _, where, i in placed(data, some):
        # nothing is before the first one
        counts[row, where][1:] = True if loss_on == "text" else data.counts(i)[1:]
    return TokenRows(tokens, segments, counts)


def _keys(
    data: Tokenised, some: list[list[int]], rows: TokenRows, step: StepId
) -> UInt32[np.ndarray, "b t 2"]:
    keys = np.zeros((*rows.tokens.shape, 2), np.uint32)
    for row, _, where, i in placed(data, some):
        keys[row, where] = keys_of_sample(step, i, len(data.tokens[i]))
    return keys


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
        return Sgd(self.momentum, self.weight_decay).at(learning_rate)


class LoraState(NamedTuple):
    """All that a step changes.

    Attributes:
      adapter: lora_a and lora_b of every changed projection, float32, nested as the decoder is.
      optimiser: Its state.
    """

    adapter: Params
    optimiser: optax.OptState


def initial_adapter(architecture: CausalModel, seed: int) -> Params:
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
    architecture: CausalModel, params: Params, adapter: Params, rows: TokenRows, sums: Sums
) -> Sums:
    """Adds loss and gradients of some rows.

    Args:
      architecture: With an adapter.
      params: Parameters of the frozen model.
      adapter: See `LoraState`.
      rows: Rows of the step.
      sums: Sums over its other rows.
    """

    tokens, segments, counts, keys = jax.tree.map(jnp.asarray, rows)

    def loss_of(adapter: Params) -> Float[Array, ""]:
        whole = joined(params, adapter)
        hidden = architecture.hidden(whole, tokens, segments, keys)
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
