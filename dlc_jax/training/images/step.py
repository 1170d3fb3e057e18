"""The compiled programs of fine-tuning: a training step, and outputs in evaluation mode."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from dlc_jax.distributed import fetch, mesh_of, place_rows
from dlc_jax.encoders.encoder import Encoder, join_statistics, precision_of, split_statistics
from dlc_jax.preprocess.images import filled
from dlc_jax.probes.kernel import Forward, cast, pooled
from dlc_jax.training.optimiser import Sgd
from dlc_jax.types import Params


class Network(NamedTuple):
    """What the programs are specialised to: hashable, no weights in it; by default a head alone.

    Attributes:
      forward: The encoder in evaluation mode; None where inputs are features already.
      apply_training: See `Encoder`.
    """

    forward: Forward | None = None
    apply_training: Callable[[Params, Array, Array], tuple[Array, Params]] | None = None

    @classmethod
    def of(cls, encoder: Encoder, dtype: str) -> Network:
        """The encoder and a linear head on it."""
        return cls(Forward.of(encoder, dtype, "own"), encoder.apply_training)


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      trained: `encoder` and `head`, float32; None in the places of `statistics`.
      statistics: The encoder's leaves that no gradient moves; None in all other places.
      optimiser: State of `Sgd`.
    """

    trained: dict[str, Any]
    statistics: Params
    optimiser: optax.OptState

    @classmethod
    def start(
        cls, params: Params, statistics: frozenset[str], head: dict[str, Any], sgd: Sgd
    ) -> TrainState:
        """The state before the first step; whatever the encoder comes in, it trains in float32."""
        encoder, others = split_statistics(cast(params, "float32"), statistics)
        trained = {"encoder": encoder, "head": head}
        optimiser = sgd.at(0.0).init(trained)
        return jax.tree.map(jnp.asarray, cls(trained, others, optimiser))

    def weights(self) -> dict[str, Any]:
        """Returns the whole encoder and the head."""
        encoder = join_statistics(self.trained["encoder"], self.statistics)
        return {"encoder": encoder, "head": self.trained["head"]}


def initial_head(
    num_features: int, num_classes: int, kind: str, seed: int
) -> dict[str, np.ndarray]:
    """Returns a new head as timm makes it, kernel [d, c] and bias [c].

    Args:
      num_features, num_classes: Its size.
      kind: See `Encoder.head`. `mean`: torch.nn.Linear's default, both uniform in +-1 / sqrt(d).
        `cls` and `own`: normal with deviation 0.02 (timm's truncation is at 100 deviations), and
        zero bias.
      seed: Seed of the draw.
    """
    generator = np.random.default_rng([seed, zlib.crc32(b"head")])
    shape = (num_features, num_classes)
    if kind != "mean":
        kernel = generator.normal(0, 0.02, shape)
        bias = np.zeros(num_classes)
    else:
        bound = 1 / math.sqrt(num_features)
        kernel = generator.uniform(-bound, bound, shape)
        bias = generator.uniform(-bound, bound, num_classes)
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


class StepMetrics(NamedTuple):
    """Over the real samples of a batch."""

    loss: Float[Array, ""]  # mean cross-entropy in nats
    correct: Bool[Array, " b"]  # whether the highest logit was right; False for padding


@functools.partial(jax.jit, static_argnames=("network", "sgd"))
def train_step(
    network: Network,
    sgd: Sgd,
    state: TrainState,
    inputs: Shaped[Array, "b ..."],
    labels: Int[Array, " b"],
    real: Float[Array, " b"],
    learning_rate: Float[Array, ""],
) -> tuple[TrainState, StepMetrics]:
    """Takes one step of SGD on the mean loss of the real samples.

    Args:
      network, sgd: What to train, and how.
      state: Where it stands.
      inputs: Images, uint8 [b, s, s, 3], or features, float32 [b, d].
      labels: Class ids.
      real: 1 for samples, 0 for padding, which neither loss nor batch statistics see.
      learning_rate: Learning rate of this step.
    """

    def loss_of(trained: dict[str, Any]) -> tuple[Float[Array, ""], tuple]:
        features, statistics = _features_in_training(
            network, trained["encoder"], state.statistics, inputs, real
        )
        logits = _head(trained["head"], features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(axis=1) == labels) & (real > 0)
        return (losses * real).sum() / real.sum(), (statistics, correct)

    (loss, (statistics, correct)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.trained
    )
    updates, optimiser = sgd.at(learning_rate).update(gradients, state.optimiser, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return TrainState(trained, statistics, optimiser), StepMetrics(loss, correct)


@functools.partial(jax.jit, static_argnames=("network",))
def outputs_of_batch(
    network: Network, state: TrainState, inputs: Shaped[Array, "b ..."]
) -> tuple[Float[Array, "b c"], Float[Array, " b"]]:
    """Returns the logits, and the squared norms of the head's input, in evaluation mode."""
    features = inputs
    if (forward := network.forward) is not None:
        encoder = cast(state.trained["encoder"], forward.dtype)
        features = forward.with_params(join_statistics(encoder, state.statistics), inputs)
    return _head(state.trained["head"], features), jnp.square(features).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("network",))
def predicted_classes(
    network: Network, state: TrainState, inputs: Shaped[Array, "b ..."]
) -> Int[Array, " b"]:
    """Returns the class of highest logit, in evaluation mode."""
    return outputs_of_batch(network, state, inputs)[0].argmax(axis=1)


def _features_in_training(
    network: Network, encoder: Params, statistics: Params, inputs: Array, real: Array
) -> tuple[Float[Array, "b d"], Params]:
    """Returns features, and the statistics as the batch moves them."""
    if (forward := network.forward) is None:
        return inputs, statistics
    # statistics stay float32: a tenth of a batch's would vanish in bfloat16
    params = join_statistics(cast(encoder, forward.dtype), statistics)
    with precision_of(forward.dtype):
        if network.apply_training is None:
            output = forward.apply(params, forward.normalised(inputs))
        else:
            output, params = network.apply_training(params, forward.normalised(inputs), real)
            moved = jax.tree.map(
                lambda old, new: None if old is None else new.astype(old.dtype),
                statistics,
                params,
                is_leaf=lambda leaf: leaf is None,
            )
            statistics = jax.lax.stop_gradient(moved)
    return pooled(output, len(inputs), forward.pooling), statistics


def _head(head: dict[str, Any], features: Float[Array, "b d"]) -> Float[Array, "b c"]:
    with precision_of("float32"):
        return features @ head["kernel"] + head["bias"]


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
