"""What scoring and fine-tuning an image encoder take on every device, from shapes alone.

Tests compare it with what XLA says of compiled programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dlc_jax.distributed import one_device
from dlc_jax.encoders import Encoder
from dlc_jax.masking import Thresholds, prunable_paths
from dlc_jax.planning.machine import is_processor
from dlc_jax.planning.memory import Memory, MemoryPlan, Values, doubled, halved, tree_bytes
from dlc_jax.planning.programs import count_flops, peak_bytes
from dlc_jax.probes.kernel import Forward, features_of_batch, losses_of_batches
from dlc_jax.training.images import FinetuneConfig
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step
from dlc_jax.types import Params, by_path

_BATCHES = 2  # on a device: one is computed while the next one comes
Shape: Any = jax.ShapeDtypeStruct  # also where arrays are expected


@dataclasses.dataclass(frozen=True, eq=False)
class ImageScoring:
    """How images are scored on one device.

    Attributes:
      encoder: With what its mode decides filled in.
      image_size: In pixels.
      num_classes: c.
      num_probes: Probes that this device computes.
      chunk: Probes side by side.
      dtype: See `probe`.
      holds_importance: Whether the importance of weights is an array of its own; otherwise it is
        their magnitude, which XLA computes once, ahead of the loop over probes.
      batch_size: Images per batch.
    """

    encoder: Encoder
    image_size: int
    num_classes: int
    num_probes: int
    chunk: int
    dtype: str
    holds_importance: bool
    batch_size: int

    def describe(self) -> str:
        return (
            f"{self.num_probes} probes per device in {self.dtype}, {self.chunk} at once, "
            f"{self.batch_size} images per device and call"
        )

    def changes(self) -> Iterator[Values]:
        change = functools.partial(dataclasses.replace, self)
        yield halved("probe.batch_size", self.batch_size, 1, change)
        yield halved("probe.chunk", self.chunk, 1, change)
        if not is_processor():
            yield [("probe.dtype=bfloat16", change(dtype="bfloat16"))]

    def plan(self) -> MemoryPlan:
        """Returns the plan."""
        arguments = self.arguments()
        params, _, thresholds, prototypes, images, _ = arguments
        prunable = self._prunable()
        masked = self.chunk * tree_bytes(prunable)
        peak = peak_bytes(self.program(), *arguments)
        losses = (4 + 4) * self.num_probes * self.batch_size  # and nearest classes
        image_bytes = images.size * (_BATCHES + jnp.dtype(_kept_in(self.dtype)).itemsize)
        return MemoryPlan.of(
            Memory("weights", tree_bytes(params)),
            Memory("importance of weights", 4 * sum(leaf.size for leaf in prunable.values())),
            Memory("masked weights", masked),
            Memory("masked weights in another layout", masked),
            Memory("activations", max(0, peak - masked)),
            Memory("images, as they come and normalised", image_bytes),
            Memory("thresholds, prototypes, losses", tree_bytes((thresholds, prototypes)) + losses),
        )

    def program(self) -> Any:
        """Returns the function of `arguments` that scores a batch."""
        forward = Forward.of(self.encoder, _kept_in(self.dtype))
        paths = tuple(self._prunable())
        return functools.partial(losses_of_batches, forward, paths, self.chunk, one_device())

    def arguments(self) -> tuple[Any, ...]:
        """Returns shapes and types of what `program` takes."""
        prunable = self._prunable()
        importance = None
        if self.holds_importance:
            importance = {path: Shape(leaf.shape, jnp.float32) for path, leaf in prunable.items()}
        num_padded = -(-self.num_probes // self.chunk) * self.chunk
        value = Shape((num_padded,), jnp.float32 if self.holds_importance else jnp.int32)
        images = images_of(self.batch_size, self.image_size)
        return (
            shapes(self.encoder.params),
            importance,
            Thresholds(value, Shape((num_padded, len(prunable)), jnp.int32)),
            Shape((self.num_classes, num_features(self.encoder, self.image_size)), jnp.float32),
            Shape((1, *images.shape), images.dtype),
            Shape((1, self.batch_size), jnp.int32),
        )

    def _prunable(self) -> dict[str, Any]:
        """Returns what probes mask."""
        leaves = by_path(self.encoder.params)
        paths = prunable_paths(self.encoder.params, self.encoder.is_prunable)
        return {path: leaves[path] for path in paths}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFinetuning:
    """How an image encoder is fine-tuned.

    Attributes:
      encoder, image_size, num_classes: See `ImageScoring`.
      settings: How.
      num_devices: Number of devices that a batch is divided among.
    """

    encoder: Encoder
    image_size: int
    num_classes: int
    settings: FinetuneConfig
    num_devices: int

    def describe(self) -> str:
        settings = self.settings
        trained = "a linear head" if settings.linear_probe else "all weights"
        return (
            f"{trained} in {settings.dtype}, batches of {settings.batch_size}, {self._num_rows} "
            "per device"
        )

    def changes(self) -> Iterator[Values]:
        def change(**settings: Any) -> ImageFinetuning:
            changed = dataclasses.replace(self.settings, **settings)
            return dataclasses.replace(self, settings=changed)

        batch_size = self.settings.batch_size
        yield halved("finetune.batch_size", batch_size, self.num_devices, change)
        if not is_processor():
            yield [("finetune.dtype=bfloat16", change(dtype="bfloat16"))]

            def on(num: int) -> ImageFinetuning:
                return dataclasses.replace(self, num_devices=num)

            yield doubled("mesh.data=-1 on {} devices", self.num_devices, 1, on)

    @property
    def _num_rows(self) -> int:
        return -(-self.settings.batch_size // self.num_devices)

    def plan(self) -> MemoryPlan:
        """Returns the plan."""
        arguments = self.arguments()
        state, inputs = arguments[:2]
        trained = tree_bytes(state.trained)
        # the state after a step, and gradients, are there beside the state before
        after = tree_bytes(state) + trained
        peak = peak_bytes(self.program(), *arguments)
        frozen = tree_bytes(shapes(self.encoder.params)) if self.settings.linear_probe else 0
        return MemoryPlan.of(
            Memory("encoder, not trained", frozen),
            Memory("weights", trained + tree_bytes(state.statistics)),
            Memory("optimiser", tree_bytes(state.optimiser)),
            Memory("both after a step, and gradients", after),
            Memory("weights in another layout", 0 if self.settings.linear_probe else trained),
            Memory("activations", max(0, peak - after)),
            Memory("batches, as they come", _BATCHES * tree_bytes(inputs)),
        )

    def program(self) -> Any:
        """Returns the function of `arguments` that takes a step."""
        network = Network()
        if not self.settings.linear_probe:
            network = Network.of(self.encoder, _kept_in(self.settings.dtype))
        return functools.partial(train_step, network, Sgd.of(self.settings))

    def arguments(self) -> tuple[Any, ...]:
        """Returns shapes and types of what `program` takes on one device."""
        num_rows = self._num_rows
        width = num_features(self.encoder, self.image_size)
        head = shapes(initial_head(width, self.num_classes, self.encoder.head, seed=0))
        if self.settings.linear_probe:
            inputs = Shape((num_rows, width), jnp.float32)
            start = functools.partial(TrainState.start, {}, frozenset())
        else:
            inputs = images_of(num_rows, self.image_size)
            params = self.encoder.with_random_key(self.encoder.params, seed=0)
            start = functools.partial(TrainState.start, params, self.encoder.statistics)
        state = jax.eval_shape(lambda head: start(head, Sgd.of(self.settings)), head)
        labels, real = Shape((num_rows,), jnp.int32), Shape((num_rows,), jnp.float32)
        return state, inputs, labels, real, Shape((), jnp.float32)


def num_features(encoder: Encoder, image_size: int) -> int:
    """Returns d."""
    forward, images = Forward.of(encoder, "float32"), images_of(1, image_size)
    return features_of_batch.eval_shape(forward, shapes(encoder.params), images).shape[1]


def forward_flops(encoder: Encoder, image_size: int) -> int:
    """Returns the operations for an image through the unmasked encoder."""
    forward, images = Forward.of(encoder, "float32"), images_of(1, image_size)
    program = functools.partial(features_of_batch, forward)
    return count_flops(program, shapes(encoder.params), images)


def images_of(num: int, image_size: int) -> jax.ShapeDtypeStruct:
    """Returns the shape and type of so many images."""
    return Shape((num, image_size, image_size, 3), jnp.uint8)


def shapes(params: Params) -> Params:
    """Returns shapes and types of arrays."""
    return jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype), params)


def _kept_in(dtype: str) -> str:
    """XLA computes bfloat16 in float32 on processors, and keeps the values so."""
    return "float32" if is_processor() else dtype
