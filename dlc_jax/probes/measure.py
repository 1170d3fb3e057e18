"""From images to losses [m, n]: loads, pads to one batch shape, and drives the two programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.encoders import Encoder
from dlc_jax.masking import (
    MASKINGS,
    Importance,
    PathCounts,
    Thresholds,
    check_path,
    exact_thresholds,
    path_counts,
    prunable_paths,
    removal_steps,
    weight_importance,
)
from dlc_jax.preprocess import LoadedImages, RandomCrops, load_images
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

    Every image is decoded once, unless `augment` is on. One compiled program maps all probes over
    a batch; a probe is a threshold on the importance of weights, so memory does not grow with
    their number.

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
        decodes every image twice more and cuts m crops from it.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      seed: Seed of random masking and of `augment`.
      mode: `default`, or `official` for the released code's schedule, normalisation, ViT pooling
        and order among equally small weights.
      progress: Whether to show bars on the terminal.
    Returns:
      Losses [m, n] in nats, higher is harder, with sparsity, labels, ids and prototypes.
    Raises:
      ValueError: an unknown name, a value out of range, an unreadable sample, a class without a
        sample or one class only, or an encoder whose output has another shape than `Encoder` says
        or yields losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    """
    encoder = encoder.for_mode(mode)
    schedule = schedule or SCHEDULE_OF_MODE[mode]
    check_path(schedule, step, num_probes, placement, max_sparsity)
    checks.one_of("probe.masking", masking, MASKINGS)
    checks.one_of("probe.dtype", dtype, DTYPES)
    checks.at_least("probe.batch_size", batch_size, 1)
    checks.seed(seed)
    resolve_chunk(chunk, num_probes)
    encoder.check_image_size(image_size)

    counts = functools.partial(
        path_counts,
        schedule=schedule,
        step=step,
        num_probes=num_probes,
        placement=placement,
        max_sparsity=max_sparsity,
    )
    path = _learning_path(encoder, counts, masking, seed, mode)

    loaded = load_images(dataset, image_size, on_corrupt=on_corrupt, progress=progress)
    labels, ids = dataset.labels[loaded.positions], dataset.ids[loaded.positions]
    why = " (skipped samples do not count)" if loaded.skipped else ""
    checks.prototypes_can_differ(dataset.name, labels, dataset.class_names, why)
    source = _Source(loaded, RandomCrops(dataset, image_size, seed) if augment else None)
    batches = Batches(len(labels), batch_size)
    prototypes = class_means(
        _features(encoder, dtype, batches, source.pixels), labels, dataset.class_names
    )
    program = _Program(encoder, dtype, path, prototypes, chunk=resolve_chunk(chunk, len(path)))
    with tqdm(
        total=len(path) * len(labels),
        desc=f"{len(path)} probes",
        unit="img x probe",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        run = _losses if source.crops is None else _augmented_losses
        losses = run(program, batches, source, labels, bar)
    checks.losses_are_finite(losses, ids)
    return ProbeLosses(
        losses=losses,
        sparsity=path.sparsity,
        labels=labels,
        ids=ids,
        prototypes=prototypes,
        class_names=dataset.class_names,
        skipped=loaded.skipped,
    )


def resolve_chunk(chunk: int | str, num_probes: int) -> int:
    """Returns how many probes to map side by side: at most `chunk`, more than half of it.

    Within that range, the number that leaves the fewest places of the last chunk empty. `auto` is
    one after another: on CPU that is fastest for every architecture (BUILD_NOTES, "Chunk"), since
    side by side convolutions become grouped ones and matmuls batched ones. Other backends take
    the same until they are measured.
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


class _LearningPath(NamedTuple):
    """The masked networks of one run."""

    prunable: tuple[str, ...]
    importance: Importance
    thresholds: Thresholds
    sparsity: Float32[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.sparsity)


def _learning_path(
    encoder: Encoder, counts: Callable[[int], PathCounts], masking: str, seed: int, mode: str
) -> _LearningPath:
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[path].size for path in prunable)
    grid, chosen = counts(num_weights)
    if mode == "official" and masking == "l1":
        in_order = prunable
        if encoder.module_order is not None:
            in_order = tuple(sorted(prunable, key=encoder.module_order))
        importance = removal_steps(encoder.params, in_order, grid)
    else:
        importance = weight_importance(encoder.params, prunable, masking, seed)
    thresholds = exact_thresholds(encoder.params, prunable, importance, chosen)
    sparsity = (chosen / num_weights).astype(np.float32)
    return _LearningPath(prunable, jax.device_put(importance), thresholds, sparsity)


class _Source(NamedTuple):
    """Where batches of pixels come from."""

    loaded: LoadedImages
    crops: RandomCrops | None

    def pixels(self, where: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b s s 3"]:
        """Returns what prototypes are made of."""
        if self.crops is None:
            return self.loaded.pixels[where]
        positions = self.loaded.positions[where]
        return self.crops.cut(self.crops.originals(positions), positions, draw=0)


class _Program(NamedTuple):
    """The probe program with everything that its calls share."""

    encoder: Encoder
    dtype: str
    path: _LearningPath
    prototypes: Float32[np.ndarray, "c d"]
    chunk: int

    def losses(
        self,
        thresholds: Thresholds,
        images: UInt8[np.ndarray, "b s s 3"],
        labels: Int32[np.ndarray, " b"],
    ) -> jax.Array:
        return losses_of_batch(
            Forward.of(self.encoder, self.dtype),
            self.path.prunable,
            min(self.chunk, len(thresholds.value)),
            self.encoder.params,
            self.path.importance,
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
    program: _Program,
    batches: Batches,
    source: _Source,
    labels: Int32[np.ndarray, " n"],
    bar: tqdm,
) -> Float32[np.ndarray, "m n"]:
    num_probes, chunk = len(program.path), program.chunk
    # full chunks only: the last probe fills up the last one and is dropped again
    padded = np.minimum(np.arange(-(-num_probes // chunk) * chunk), num_probes - 1)
    thresholds = jax.device_put(Thresholds(*(part[padded] for part in program.path.thresholds)))
    parts: list[np.ndarray] = []
    pending: list[tuple[jax.Array, int]] = []

    def fetch() -> None:
        result, real = pending.pop(0)
        parts.append(np.asarray(result)[:num_probes, :real])
        bar.update(num_probes * real)

    for where, real in batches:
        # one batch ahead: the device computes while the next one is gathered and sent
        images = source.loaded.pixels[where]
        pending.append((program.losses(thresholds, images, labels[where]), real))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    return np.concatenate(parts, axis=1)


def _augmented_losses(
    program: _Program,
    batches: Batches,
    source: _Source,
    labels: Int32[np.ndarray, " n"],
    bar: tqdm,
) -> Float32[np.ndarray, "m n"]:
    crops = source.crops
    assert crops is not None
    parts = []
    for where, real in batches:
        positions = source.loaded.positions[where]
        originals = crops.originals(positions)
        rows = []
        for k in range(len(program.path)):
            threshold = Thresholds(*(part[k : k + 1] for part in program.path.thresholds))
            images = crops.cut(originals, positions, draw=k + 1)
            rows.append(np.asarray(program.losses(threshold, images, labels[where])))
        parts.append(np.concatenate(rows)[:, :real])
        bar.update(len(program.path) * real)
    return np.concatenate(parts, axis=1)
