"""The two compiled programs: features of a batch, and its losses against class prototypes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Float64, Int, Int64, UInt8

from dlc_jax import expect
from dlc_jax.distributed import DATA, PROBE
from dlc_jax.encoders.encoder import Encoder, normalise, pool, precision_of
from dlc_jax.masking import Importance, Thresholds, masked
from dlc_jax.types import Params

_SMALLEST_SQUARE = 1e-12  # keeps 1 / distance finite for a sample that is its own prototype


class ClassSums:
    """Sums of the features of each class, float64, and how many they are of.

    Samples are added one by one in their order, so that the way they are batched changes nothing.

    Args:
      num_classes: c.
    """

    def __init__(self, num_classes: int):
        self.sums: Float64[np.ndarray, "c d"] = np.zeros((num_classes, 0))
        self.counts: Int64[np.ndarray, " c"] = np.zeros(num_classes, np.int64)

    def add(self, features: Float[np.ndarray, "b d"], labels: Int[np.ndarray, " b"]) -> None:
        """Adds samples, labels in [0, c)."""
        if not self.sums.size:
            self.sums = np.zeros((len(self.counts), features.shape[1]))
        for label, row in zip(labels.tolist(), features, strict=True):  # np.add.at: 15 to 40 times
            self.sums[label] += row
        self.counts += np.bincount(labels, minlength=len(self.counts))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the sums of the classes that have samples, to be kept."""
        there = np.flatnonzero(self.counts)
        return {"classes": there, "sums": self.sums[there], "counts": self.counts[there]}

    def add_arrays(self, other: Mapping[str, np.ndarray]) -> None:
        """Adds what `arrays` gave of other samples."""
        there = other["classes"]
        if len(there) and not self.sums.size:
            self.sums = np.zeros((len(self.counts), other["sums"].shape[1]))
        self.sums[there] += other["sums"]
        self.counts[there] += other["counts"]

    def means(self) -> Float32[np.ndarray, "c d"]:
        """Returns the mean feature of each class; NaN for a class without samples."""
        with np.errstate(invalid="ignore"):
            return (self.sums / self.counts[:, None]).astype(np.float32)


def prototype_loss(
    features: Float[Array, "b d"], labels: Int[Array, " b"], prototypes: Float[Array, "c d"]
) -> Float[Array, " b"]:
    """Returns each sample's cross-entropy under inverse-distance logits.

    logits[i, j] = 1 / ||features[i] - prototypes[j]||.

    Args:
      features: Encoder output, not normalised; float32.
      labels: Class ids in [0, c).
      prototypes: Class means of the unmasked features.
    Returns:
      Loss in nats; higher is harder. Losses crowd within about 0.02 of log c, so distances are
      computed at full float32 precision on every device.
    Source: Jiang et al. 2025, section 3; released score-wot.py.
    """
    return _cross_entropy(_logits(features, prototypes), labels)


def _logits(features: Float[Array, "b d"], prototypes: Float[Array, "c d"]) -> Float[Array, "b c"]:
    highest = jax.lax.Precision.HIGHEST
    dots = jnp.matmul(features, prototypes.T, precision=highest)
    norms = jnp.sum(features**2, axis=1)[:, None] + jnp.sum(prototypes**2, axis=1)[None, :]
    return jax.lax.rsqrt(jnp.maximum(norms - 2 * dots, _SMALLEST_SQUARE))


def _cross_entropy(logits: Float[Array, "b c"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - own


DTYPES = ("float32", "bfloat16")
_WHOLE = P()

# XLA:CPU gives convolutions and matmuls to YNNPACK, which takes longer over them than XLA's own way
# (docs/log/speed.md). jaxlib knows the option from 0.9.0 on; what other
# platforms compile does not depend on it. JAX traces no program with options inside another.
COMPILER_OPTIONS: dict[str, str | bool] | None = (
    {"xla_cpu_experimental_ynn_fusion_type": ""}  # of nothing
    if jaxlib.version.__version_info__ >= (0, 9)
    else None
)
_compiled = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
_on_devices = functools.partial(jax.shard_map, check_vma=False)


class Forward(NamedTuple):
    """What the programs are specialised to: hashable, no weights in it."""

    apply: Callable[[Params, Array], Array]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooling: str
    dtype: str

    @classmethod
    def of(cls, encoder: Encoder, dtype: str, pooling: str | None = None) -> Forward:
        """The encoder, pooled as it is for scoring or else by `pooling`."""
        apply, pooling = encoder.function_and_pooling(pooling or encoder.pooling or "mean")
        return cls(apply, encoder.mean, encoder.std, pooling, dtype)

    def __call__(self, params: Params, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Normalises on the device, runs the network in `dtype`, pools in float32."""
        return self.with_params(cast(params, self.dtype), images)

    def with_params(self, params: Params, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """The same with parameters of whatever types they are."""
        with precision_of(self.dtype):
            output = self.apply(params, self.normalised(images))
        return pooled(output, len(images), self.pooling)

    def normalised(self, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b s s 3"]:
        """Returns what the network takes."""
        return normalise(images, self.mean, self.std).astype(self.dtype)


def cast(params: Params, dtype: str) -> Params:
    """Returns the tree with its floating leaves in `dtype`."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        params,
    )


def pooled(output: Any, num_images: int, pooling: str) -> Float[Array, "b d"]:
    """Returns what a network gave as one vector per image, float32 or wider.

    Raises:
      ValueError: it is not features, a map or tokens for that many images.
    """
    shape: tuple[int, ...] = getattr(output, "shape", ())
    if len(shape) not in (2, 3, 4) or shape[0] != num_images:
        found = f"an array of shape {shape}" if shape else f"a {type(output).__name__}"
        raise expect.InputError(
            f"encoder: apply gave {found} for {num_images} images; expected features "
            "[b, d], a map [b, h, w, d] (channels last) or tokens [b, t, d]."
        )
    if pooling == "own" and len(shape) != 2:
        raise expect.InputError(
            f"encoder.head: 'own' needs features [b, d], got an array of shape {shape}; expected "
            "apply_head, or 'mean' or 'cls'."
        )
    return pool(output.astype(jnp.promote_types(output.dtype, jnp.float32)), pooling)


@functools.partial(_compiled, static_argnames=("forward",))
def features_of_batch(
    forward: Forward, params: Params, images: UInt8[Array, "b s s 3"]
) -> Float[Array, "b d"]:
    """Returns the unmasked features, float32."""
    return forward(params, images)


@functools.partial(_compiled, static_argnames=("forward", "mesh"))
def features_of_batches(
    forward: Forward, mesh: Mesh, params: Params, images: UInt8[Array, "k b s s 3"]
) -> Float[Array, "k b d"]:
    """Returns the unmasked features of k batches, one for each part of the mesh's data axis."""

    def of_one(params: Params, images: UInt8[Array, "1 b s s 3"]) -> Float[Array, "1 b d"]:
        return forward(params, images[0])[None]

    on_all = _on_devices(of_one, mesh=mesh, in_specs=(_WHOLE, P(DATA)), out_specs=P(DATA))
    return on_all(params, images)


@functools.partial(_compiled, static_argnames=("forward", "prunable", "chunk", "mesh"))
def losses_of_batches(
    forward: Forward,
    prunable: tuple[str, ...],
    chunk: int,
    mesh: Mesh,
    params: Params,
    importance: Importance,
    thresholds: Thresholds,
    prototypes: Float[Array, "c d"],
    images: UInt8[Array, "k b s s 3"],
    labels: Int[Array, "k b"],
) -> tuple[Float[Array, "k m b"], Int[Array, "k m b"]]:
    """Returns losses and nearest classes of k batches under every probe, in one program.

    Of prototypes that are equally near, the first counts.

    Each part of the mesh's data axis takes one whole batch and each part of its probe axis some of
    the probes: every device computes what one device alone would compute of them, so that the
    number of devices does not show in the losses, and no device waits for another. There the probes
    are mapped over, `chunk` of them side by side (1: one after another, which holds one masked copy
    of the weights at a time). m must be a multiple of `chunk` times the probe axis.
    """

    def on_one_device(
        params: Params,
        importance: Importance,
        thresholds: Thresholds,
        prototypes: Float[Array, "c d"],
        images: UInt8[Array, "1 b s s 3"],
        labels: Int[Array, "1 b"],
    ) -> tuple[Float[Array, "1 p b"], Int[Array, "1 p b"]]:
        def one_probe(threshold: Thresholds) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
            # keeps XLA from holding the magnitudes of all weights, computed ahead of the loop
            frozen, threshold = jax.lax.optimization_barrier((params, threshold))
            features = forward(masked(frozen, prunable, importance, threshold), images[0])
            logits = _logits(features, prototypes)
            return _cross_entropy(logits, labels[0]), jax.lax.argmax(logits, 1, jnp.int32)

        # a batch of one would still turn convolutions into grouped ones
        size = None if chunk == 1 else chunk
        losses, nearest = jax.lax.map(one_probe, thresholds, batch_size=size)
        return losses[None], nearest[None]

    where = (_WHOLE, _WHOLE, P(PROBE), _WHOLE, P(DATA), P(DATA))
    on_all = _on_devices(on_one_device, mesh=mesh, in_specs=where, out_specs=P(DATA, PROBE))
    return on_all(params, importance, thresholds, prototypes, images, labels)
