"""From images to losses [m, n]: checks, sets up the two passes, and calls the two programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from PIL import Image

import dlc_jax
from dlc_jax import artefacts, checks
from dlc_jax.encoders import Encoder
from dlc_jax.masking import MASKINGS, Thresholds, check_path, path_counts
from dlc_jax.preprocess import (
    ON_CORRUPT,
    ImageCache,
    RandomCrops,
    Reader,
    evaluation_crops,
    filled,
    in_batches,
    shown,
)
from dlc_jax.probes.kernel import DTYPES, Forward, features_of_batch, losses_of_batch
from dlc_jax.probes.passes import Unfinished, measure_losses, measure_prototypes, one_ahead
from dlc_jax.probes.path import LearningPath, learning_path
from dlc_jax.types import Dataset, ProbeLosses

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
    cache: ImageCache | None = None,
    progress: bool = False,
) -> Float32[np.ndarray, "n d"]:
    """Returns the unmasked encoder's pooled features of every sample, not normalised.

    Args: see `probe`. With `on_corrupt="skip"` unreadable samples have no row.
    Raises:
      ValueError: see `probe`.
    """
    checks.one_of("probe.dtype", dtype, DTYPES)
    checks.at_least("probe.batch_size", batch_size, 1)
    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)
    encoder = encoder.for_mode(mode)
    encoder.check_image_size(image_size)
    reader = evaluation_crops(
        dataset, image_size, on_corrupt=on_corrupt, cache=cache, progress=progress
    )
    skipped: dict[int, str] | None = {} if on_corrupt == "skip" else None
    items = reader.readable(np.arange(len(dataset)), skipped)
    batches = in_batches(shown(items, "features", len(dataset), progress), batch_size)
    features_of = _features_of(encoder, dtype, min(batch_size, len(dataset)))
    started = ((features_of(pixels), len(where)) for where, pixels in batches)
    parts = [values[:real] for values, real in one_ahead(started)]
    checks.some_readable(dataset.name, len(parts), len(dataset))
    return np.concatenate(parts)


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
    cache: ImageCache | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    mode: str = "default",
    progress: bool = False,
) -> ProbeLosses:
    """Measures how well masked copies of the encoder tell each sample's class.

    Images pass by twice, for the prototypes and for the losses, and are not kept: memory grows
    neither with their number nor, since a probe is a threshold on the importance of weights, with
    that of the probes. One compiled program maps all probes over a batch.

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
      augment: Whether each probe sees a fresh random crop and flip, as in the released code.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      cache: Where decoded images are kept, for later runs too; without one every image is decoded
        twice. Not used with `augment`.
      folder: Where what is finished is kept until all of it is, so that the same call goes on from
        there if it was stopped; yours to remove afterwards. None: nowhere.
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
    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)
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
    checks.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
    unfinished = Unfinished(None)
    if folder is not None:
        decisive = [schedule, step, num_probes, placement, max_sparsity, masking, image_size]
        decisive += [batch_size, chunk, dtype, augment, on_corrupt, seed, mode]
        unfinished = _unfinished(Path(folder), encoder, dataset, decisive)
    path = learning_path(encoder, counts, masking, seed, mode)
    program = _Program(encoder, dtype, path, dataset.labels, resolve_chunk(chunk, len(path)))
    crops = RandomCrops(dataset, image_size, seed) if augment else None
    if crops is None:
        pixels = evaluation_crops(
            dataset, image_size, on_corrupt=on_corrupt, cache=cache, progress=progress
        )
    else:
        pixels = Reader(dataset, lambda image, position: crops.crop(image, position, draw=0))
    found = measure_prototypes(
        pixels,
        program.features_of(min(batch_size, len(dataset))),
        batch_size=batch_size,
        on_corrupt=on_corrupt,
        unfinished=unfinished,
        progress=progress,
    )
    rest = functools.partial(
        measure_losses,
        positions=found.positions,
        num_probes=len(path),
        batch_size=batch_size,
        unfinished=unfinished,
        progress=progress,
    )
    size = min(batch_size, len(found.positions))
    if crops is None:
        losses = rest(pixels, program.losses_of(found.means, size))
    else:
        originals = Reader(dataset, lambda image, _: image)
        losses = rest(originals, program.losses_under_crops(crops, found.means, size))
    ids = dataset.ids if not found.skipped else dataset.ids[found.positions]
    checks.losses_are_finite(losses, ids)
    return ProbeLosses(
        losses=losses,
        sparsity=path.sparsity,
        labels=dataset.labels[found.positions],
        ids=ids,
        prototypes=found.means,
        class_names=dataset.class_names,
        skipped={str(dataset.ids[position]): why for position, why in found.skipped.items()},
    )


def _unfinished(
    folder: Path, encoder: Encoder, dataset: Dataset, decisive: list[Any]
) -> Unfinished:
    """Returns the sub-folder for what this encoder, data set, program and machine give."""
    device = jax.devices()[0]
    machine = (jax.__version__, device.platform, device.device_kind)
    inputs = (dlc_jax.__version__, machine, encoder.fingerprint, dataset.fingerprint, decisive)
    return Unfinished(folder / artefacts.json_hash(inputs)[:16])


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


class _Program(NamedTuple):
    """The two compiled programs with everything that their calls share."""

    encoder: Encoder
    dtype: str
    path: LearningPath
    labels: Int32[np.ndarray, " n"]
    chunk: int

    def features_of(self, batch_size: int) -> Callable[[list[np.ndarray]], jax.Array]:
        """Returns what gives the unmasked features of a batch of pixels."""
        return _features_of(self.encoder, self.dtype, batch_size)

    def losses_of(
        self, prototypes: Float32[np.ndarray, "c d"], batch_size: int
    ) -> Callable[[list[np.ndarray], np.ndarray], jax.Array]:
        """Returns what gives the losses of a batch of pixels under every probe, in one call."""
        thresholds = self.path.padded_to(self.chunk)
        run = functools.partial(self._losses, thresholds, self.chunk, prototypes, batch_size)
        return lambda pixels, where: run(np.stack(pixels), where)

    def losses_under_crops(
        self, crops: RandomCrops, prototypes: Float32[np.ndarray, "c d"], batch_size: int
    ) -> Callable[[list[Image.Image], np.ndarray], jax.Array]:
        """Returns the same for decoded images, of which every probe sees another crop."""

        def losses_of(images: list[Image.Image], where: np.ndarray) -> jax.Array:
            rows = []
            for k in range(len(self.path)):
                pixels = crops.cut(images, where, draw=k + 1)
                one = self.path.probe(k)
                rows.append(self._losses(one, 1, prototypes, batch_size, pixels, where))
            return jnp.concatenate(rows)

        return losses_of

    def _losses(
        self,
        thresholds: Thresholds,
        chunk: int,
        prototypes: Float32[np.ndarray, "c d"],
        batch_size: int,
        pixels: UInt8[np.ndarray, "k s s 3"],
        where: Int64[np.ndarray, " k"],
    ) -> jax.Array:
        return losses_of_batch(
            Forward.of(self.encoder, self.dtype),
            self.path.prunable,
            chunk,
            self.encoder.params,
            self.path.importance,
            thresholds,
            prototypes,
            filled(pixels, batch_size),
            filled(self.labels[where], batch_size),
        )


def _features_of(
    encoder: Encoder, dtype: str, batch_size: int
) -> Callable[[list[np.ndarray]], jax.Array]:
    forward = Forward.of(encoder, dtype)
    return lambda pixels: features_of_batch(
        forward, encoder.params, filled(np.stack(pixels), batch_size)
    )
