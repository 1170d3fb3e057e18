"""From images to losses [m, n]: loads, pads to one batch shape, and drives the two programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.encoders import Encoder
from dlc_jax.masking import (
    Importance,
    Thresholds,
    check_path,
    exact_thresholds,
    prunable_paths,
    removal_steps,
    weight_importance,
    zero_counts,
)
from dlc_jax.preprocess import RandomCrops, load_images
from dlc_jax.probes.kernel import DTYPES, Forward, features_of_batch, losses_of_batch
from dlc_jax.probes.prototypes import class_means
from dlc_jax.types import Dataset, ProbeLosses, by_path

# What `schedule=None` means in each mode.
SCHEDULE_OF_MODE = {"default": "linear", "official": "geometric"}


def features(
    encoder: Encoder,
    dataset: Dataset,
    *,
    image_size: int = 224,
    batch_size: int = 128,
    dtype: str = "float32",
    mode: str = "default",
    on_corrupt: str = "error",
    progress: bool = False,
) -> Float32[np.ndarray, "n d"]:
    """Returns the unmasked encoder's pooled features of every sample, not normalised.

    Args: see `probe`. With `on_corrupt="skip"` unreadable samples have no row.
    Raises:
      ValueError: see `probe`.
    """
    checks.one_of("probe.dtype", dtype, DTYPES)
    checks.at_least("probe.batch_size", batch_size, 1)
    encoder = encoder.for_mode(mode)
    encoder.check_image_size(image_size)
    loaded = load_images(dataset, image_size, on_corrupt=on_corrupt, progress=progress)
    batches = Batches(len(loaded.pixels), batch_size)
    return _features(encoder, dtype, batches, lambda where: loaded.pixels[where])


def probe(
    encoder: Encoder,
    dataset: Dataset,
    *,
    schedule: str | None = None,
    step: float = 0.02,
    num_probes: int = 50,
    placement: str = "grid",
    max_sparsity: float = 1.0,
    masking: str = "l1",
    image_size: int = 224,
    batch_size: int = 128,
    chunk: int | str = "auto",
    dtype: str = "float32",
    augment: bool = False,
    on_corrupt: str = "error",
    seed: int = 0,
    mode: str = "default",
    progress: bool = False,
) -> ProbeLosses:
    """Measures how well masked copies of the encoder tell each sample's class.

    Every image is decoded once. One compiled program maps all probes over a batch; a probe is a
    threshold on the importance of weights, so memory does not grow with their number.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`.
      dataset: From `load_dataset`, or your own `Dataset`.
      schedule: `linear` (paper) or `geometric` (released code); None lets `mode` decide.
      step: Share of weights zeroed per step: of all (linear) or of the remaining (geometric).
      num_probes: m; with placement `grid`, the first m steps of the path.
      placement: `grid`, or `midpoint` to spread `num_probes` over the whole path.
      max_sparsity: Cuts the path there, in (0, 1].
      masking: `l1`, magnitude, or `random`.
      image_size: Side of the images in pixels.
      batch_size: Samples per program call; changes speed and memory, not the losses.
      chunk: Most probes side by side, or `auto`; changes speed and memory, not the losses.
      dtype: What the network computes in, `float32` or `bfloat16`; distances are float32.
      augment: Whether each probe sees a fresh random crop and flip, as in the released code;
        costs one more decode and m crops per image.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      seed: Seed of random masking and of `augment`.
      mode: `default`, or `official` for the released code's schedule, normalisation, ViT pooling
        and order among equally small weights.
      progress: Whether to show bars on the terminal.
    Returns:
      Losses [m, n] in nats, higher is harder, with sparsity, labels, ids and prototypes.
    Raises:
      ValueError: an unknown name, a value out of range, an unreadable sample, a class without a
        sample, or an encoder that yields losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    """
    encoder = encoder.for_mode(mode)
    schedule = schedule or SCHEDULE_OF_MODE[mode]
    check_path(schedule, step, num_probes, placement, max_sparsity)
    checks.one_of("probe.dtype", dtype, DTYPES)
    checks.at_least("probe.batch_size", batch_size, 1)
    checks.at_least("seed", seed, 0)
    resolve_chunk(chunk, num_probes)
    encoder.check_image_size(image_size)
    prunable = prunable_paths(encoder.params, encoder.is_prunable)

    loaded = load_images(dataset, image_size, on_corrupt=on_corrupt, progress=progress)
    labels, ids = dataset.labels[loaded.positions], dataset.ids[loaded.positions]
    why = " (skipped samples do not count)" if loaded.skipped else ""
    checks.every_class_has_samples(dataset.name, labels, dataset.class_names, why)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[path].size for path in prunable)
    counts = zero_counts(
        num_weights,
        schedule=schedule,
        step=step,
        num_probes=num_probes,
        placement=placement,
        max_sparsity=max_sparsity,
    )
    if mode == "official" and masking == "l1":
        importance = removal_steps(encoder.params, prunable, counts)
    else:
        importance = weight_importance(encoder.params, prunable, masking, seed)
    thresholds = exact_thresholds(encoder.params, prunable, importance, counts)

    batches = Batches(len(labels), batch_size)
    crops = RandomCrops(dataset, image_size, seed) if augment else None

    def pixels(where: np.ndarray) -> np.ndarray:
        if crops is None:
            return loaded.pixels[where]
        positions = loaded.positions[where]
        return crops.cut(crops.originals(positions), positions, draw=0)

    prototypes = class_means(
        _features(encoder, dtype, batches, pixels), labels, dataset.class_names
    )
    path = _Path(encoder, dtype, prunable, jax.device_put(importance), thresholds, prototypes)
    with tqdm(
        total=len(counts) * len(labels),
        desc=f"{len(counts)} probes",
        unit="img x probe",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        if crops is None:
            losses = _losses(path, resolve_chunk(chunk, len(counts)), batches, pixels, labels, bar)
        else:
            losses = _augmented_losses(path, batches, crops, loaded.positions, labels, bar)
    checks.losses_are_finite(losses, ids)
    return ProbeLosses(
        losses=losses,
        sparsity=(counts / num_weights).astype(np.float32),
        labels=labels,
        ids=ids,
        prototypes=prototypes,
        class_names=dataset.class_names,
        skipped=loaded.skipped,
    )


def resolve_chunk(chunk: int | str, num_probes: int) -> int:
    """Returns how many probes to map side by side: at most `chunk`, at most half of it less.

    Within that range the number that leaves the fewest places of the last chunk empty. `auto` is
    one after another on every backend: side by side, convolutions become grouped convolutions
    and matmuls batched ones, slower on CPU (BUILD_NOTES, "Chunk"), and a batch of images alone
    fills an accelerator.
    """
    if chunk == "auto":
        return 1
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise checks.InputError(f"probe.chunk: expected 'auto' or an integer >= 1, got {chunk!r}.")
    most = min(chunk, num_probes)
    return min(range(most, most // 2, -1), key=lambda c: -num_probes % c)


class Batches(NamedTuple):
    """Positions 0..n-1 in batches of one shape; the last one repeats its first sample."""

    num_samples: int
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Int64[np.ndarray, " b"], int]]:  # type: ignore[override]
        """Yields padded positions and how many of them are real."""
        size = min(self.batch_size, self.num_samples)
        for start in range(0, self.num_samples, size):
            where = np.arange(start, min(start + size, self.num_samples))
            yield np.concatenate([where, np.full(size - len(where), start)]), len(where)


class _Path(NamedTuple):
    """What every call of the probe program shares."""

    encoder: Encoder
    dtype: str
    prunable: tuple[str, ...]
    importance: Importance
    thresholds: Thresholds
    prototypes: Float32[np.ndarray, "c d"]

    def losses(
        self,
        thresholds: Thresholds,
        chunk: int,
        images: UInt8[np.ndarray, "b s s 3"],
        labels: Int32[np.ndarray, " b"],
    ) -> jax.Array:
        return losses_of_batch(
            Forward.of(self.encoder, self.dtype),
            self.prunable,
            chunk,
            self.encoder.params,
            self.importance,
            thresholds,
            self.prototypes,
            images,
            labels,
        )


def _features(
    encoder: Encoder, dtype: str, batches: Batches, pixels: Callable[[np.ndarray], np.ndarray]
) -> Float32[np.ndarray, "n d"]:
    forward = Forward.of(encoder, dtype)
    parts = [
        np.asarray(features_of_batch(forward, encoder.params, pixels(where)))[:real]
        for where, real in batches
    ]
    return np.concatenate(parts)


def _losses(
    path: _Path,
    chunk: int,
    batches: Batches,
    pixels: Callable[[np.ndarray], np.ndarray],
    labels: Int32[np.ndarray, " n"],
    bar: tqdm,
) -> Float32[np.ndarray, "m n"]:
    num_probes = len(path.thresholds.value)
    # full chunks only: the last probe fills up the last one and is dropped again
    padded = np.minimum(np.arange(-(-num_probes // chunk) * chunk), num_probes - 1)
    thresholds = jax.device_put(Thresholds(*(part[padded] for part in path.thresholds)))
    parts: list[np.ndarray] = []
    pending: list[tuple[jax.Array, int]] = []

    def fetch() -> None:
        result, real = pending.pop(0)
        parts.append(np.asarray(result)[:num_probes, :real])
        bar.update(num_probes * real)

    for where, real in batches:
        # one batch ahead: the device computes while the next one is gathered and sent
        pending.append((path.losses(thresholds, chunk, pixels(where), labels[where]), real))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    return np.concatenate(parts, axis=1)


def _augmented_losses(
    path: _Path,
    batches: Batches,
    crops: RandomCrops,
    positions: Int64[np.ndarray, " n"],
    labels: Int32[np.ndarray, " n"],
    bar: tqdm,
) -> Float32[np.ndarray, "m n"]:
    num_probes = len(path.thresholds.value)
    parts = []
    for where, real in batches:
        originals = crops.originals(positions[where])
        rows = []
        for k in range(num_probes):
            threshold = Thresholds(*(part[k : k + 1] for part in path.thresholds))
            images = crops.cut(originals, positions[where], draw=k + 1)
            rows.append(path.losses(threshold, 1, images, labels[where]))
        parts.append(np.concatenate([np.asarray(row) for row in rows])[:, :real])
        bar.update(num_probes * real)
    return np.concatenate(parts, axis=1)
