"""From images to losses [m, n]: checks, sets up the two passes, and calls the two programs."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from dlc_jax import expect
from dlc_jax.distributed import FSDP, PROBE, Run, Team, replicated
from dlc_jax.encoders import Encoder
from dlc_jax.masking import AUTO, PathSpec
from dlc_jax.preprocess.decode import RandomCrops
from dlc_jax.preprocess.images import Images, Reader
from dlc_jax.probes.certificate import measured_path
from dlc_jax.probes.image_shards import (
    Layout,
    Pass,
    Program,
    measure_features,
    measure_losses,
    measure_prototypes,
)
from dlc_jax.probes.kernel import DTYPES, Forward
from dlc_jax.probes.path import LearningPath, learning_path
from dlc_jax.probes.shards import Parts
from dlc_jax.types import Conventions, Dataset, ProbeLosses, overridden, setting

_BATCH_SIZE = 128
_PIXELS_IN_CACHE = 16 * 224**2


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the probe program runs on images.

    Attributes:
      batch_size: Samples per program call and device; changes speed and memory, not the losses.
        `auto`: 128, and on CPUs fewer of larger images (16 at 224 px), which stay in the cache.
      chunk: Most probes side by side, or `auto`; changes speed and memory, not the losses.
      dtype: What the network computes in, `float32` or `bfloat16`; distances are float32.

    Example: `dlc.probe(encoder, dataset, compute=dlc.Compute(dtype="bfloat16"))`.
    """

    batch_size: int | str = setting(AUTO, "images per call of the probe program, or auto")
    chunk: str | int = setting(AUTO, "most probes side by side, or auto")
    dtype: str = setting("float32", f"of the network: {', '.join(DTYPES)}")

    def check(self) -> None:
        """Raises ValueError unless all values are in range; names are the configuration's."""
        for name in ("batch_size", "chunk"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if value != AUTO and (not is_number or value < 1):
                raise expect.InputError(
                    f"probe.{name}: expected {AUTO!r} or an integer >= 1, got {value!r}."
                )
        expect.one_of("probe.dtype", self.dtype, DTYPES)

    def images_per_call(self, image_size: int) -> int:
        """Returns how many images a program call takes.

        Source of `auto`: docs/log/speed.md.
        """
        if not isinstance(self.batch_size, str):
            return self.batch_size
        if jax.default_backend() != "cpu":
            return _BATCH_SIZE
        return max(1, min(_BATCH_SIZE, _PIXELS_IN_CACHE // max(image_size, 1) ** 2))

    def probes_per_call(self, num_probes: int) -> int:
        """Returns how many probes to map side by side: at most `chunk`, more than half of it.

        Within that range, the number that leaves the fewest places of the last chunk empty. `auto`
        is one after another: on CPU that is fastest for every architecture (docs/log/parity.md),
        since side by side convolutions become grouped ones and matmuls batched ones. Other backends
        take the same until they are measured.
        """
        if isinstance(self.chunk, str):
            return 1
        most = min(self.chunk, num_probes)
        return min(range(most, most // 2, -1), key=lambda c: -num_probes % c)


def features(
    encoder: Encoder,
    images: Images | Dataset,
    *,
    image_size: int | None = None,
    mode: str = "default",
    compute: Compute = Compute(),
    run: Run = Run(),
) -> Float32[np.ndarray, "n d"]:
    """Returns the unmasked encoder's pooled features of every sample, not normalised.

    Args: see `probe`. With `on_corrupt="skip"` unreadable samples have no row.
    Raises:
      ValueError: see `probe`.
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 15))
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> features = dlc.features(encoder, dataset, image_size=32)
      >>> features.shape, round(float(features.mean()), 2)
      ((50, 128), 0.64)
    """
    images = Images.of(images, image_size)
    expect.is_a(Compute, compute=compute)
    expect.is_a(Run, run=run)
    compute.check()
    encoder = encoder.for_mode(mode)
    encoder.check_image_size(images.size)
    batch_size = compute.images_per_call(images.size)
    decisive = [images.size, batch_size, compute.dtype, images.on_corrupt, mode]
    return measure_features(_first_pass("features", encoder, images, compute, run, decisive))


def probe(
    encoder: Encoder,
    images: Images | Dataset,
    *,
    image_size: int | None = None,
    schedule: str | None = None,
    step: float | None = None,
    num_probes: int | str | None = None,
    masking: str | None = None,
    mode: str = "default",
    seed: int = 0,
    path: PathSpec = PathSpec(),
    compute: Compute = Compute(),
    run: Run = Run(),
) -> ProbeLosses:
    """Measures how well masked copies of the encoder recognise each sample's class.

    Images pass by twice, for the prototypes and for the losses, and are not kept: memory grows
    neither with their number nor, since a probe is a threshold on the importance of weights, with
    that of the probes. One compiled program maps all probes over a batch.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`.
      images: From `load_dataset`, or your own `Dataset`; with `Images` also how they are read. A
        cache is not used with `augment`.
      image_size: Side of the images in pixels; None: that of `images`, 224 of a data set.
      schedule, step, num_probes, masking: Instead of those in `path`.
      mode: `default`, or `official` for the released code's schedule, normalisation, ViT pooling
        and order among equally small weights.
      seed: Seed of random masking and of `augment`.
      path: Which masked copies; see `PathSpec`.
      compute: Batch size and number type; see `Compute`.
      run: Folder, devices and bars; see `Run`. Processes that share the work all return all of it.
    Returns:
      Losses [m, n] in nats, higher is harder, with sparsity, labels, ids and prototypes.
    Raises:
      ValueError: an unknown name, a value out of range, an unreadable sample, a class without a
        sample or one class only, or an encoder whose output has another shape than `Encoder` says
        or yields losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 15))
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> path = dlc.PathSpec(num_probes=4, placement="midpoint")
      >>> probes = dlc.probe(encoder, dataset, image_size=32, path=path)
      >>> probes.losses.shape, np.round(probes.sparsity, 2).astype(str).tolist()
      ((4, 50), ['0.12', '0.36', '0.62', '0.86'])
      >>> bool(np.all(np.diff(probes.losses.mean(axis=1)) > 0))  # the more is masked, the harder
      True
    """
    images = Images.of(images, image_size)
    expect.is_a(PathSpec, path=path)
    expect.is_a(Compute, compute=compute)
    expect.is_a(Run, run=run)
    path = overridden(path, schedule=schedule, step=step, num_probes=num_probes, masking=masking)
    path = path.for_mode(mode)
    compute.check()
    encoder = encoder.for_mode(mode)
    expect.seed(seed)
    encoder.check_image_size(images.size)

    dataset = images.dataset
    expect.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
    batch_size = compute.images_per_call(images.size)
    decisive = [path.schedule, path.step, path.num_probes, path.placement, path.max_sparsity]
    decisive += [path.masking, images.size, batch_size, compute.chunk, compute.dtype, path.augment]
    decisive += [images.on_corrupt, seed, mode]
    probes = learning_path(encoder, path, seed, Conventions.of(mode))
    crops = RandomCrops(dataset, images.size, seed) if path.augment else None
    work = _first_pass("losses", encoder, images, compute, run, decisive, crops)
    means, positions, skipped = measure_prototypes(work)
    if crops is not None:
        work = work._replace(reader=Reader(dataset, lambda image, _: image))

    def losses_of(some: LearningPath, suffix: str) -> Float32[np.ndarray, "k n"]:
        chunk = compute.probes_per_call(len(some))
        start = work.program.losses_under(some, chunk, means, dataset.labels, crops)
        return measure_losses(work, start, positions, num_probes=len(some), suffix=suffix)

    return measured_path(
        path,
        probes,
        losses_of,
        labels=dataset.labels[positions],
        ids=dataset.ids[positions],
        prototypes=means,
        class_names=dataset.class_names,
        skipped={str(dataset.ids[position]): why for position, why in skipped.items()},
    )


def _first_pass(
    kind: str,
    encoder: Encoder,
    images: Images,
    compute: Compute,
    run: Run,
    decisive: list[Any],
    crops: RandomCrops | None = None,
) -> Pass:
    """Returns a pass over evaluation crops, or over the first random ones.

    Raises:
      ValueError: a mesh that these programs cannot use, or processes without a folder to share.
    """
    team = Team.alone() if run.mesh is None else Team.of(run.mesh)
    if team.mesh.shape[FSDP] > 1:
        raise expect.InputError(
            f"mesh.fsdp: {team.mesh.shape[FSDP]}; expected 1: it spreads the weights of a language "
            "model."
        )
    if team.mesh.is_multi_process:
        raise expect.InputError(
            f"mesh.probe: {team.mesh.shape[PROBE]} parts of the probes are more than the devices "
            "of a process; expected a divisor of their number, so that no two processes read the "
            "same images."
        )
    dataset = images.dataset
    parts = Parts.of(kind, run, team, lambda: [encoder.fingerprint, dataset.fingerprint, decisive])
    batch_size = min(compute.images_per_call(images.size), len(dataset))
    layout = Layout.of(len(dataset), batch_size)
    samples = layout.samples_of(team)
    if crops is None:
        reader = images.evaluation_crops(samples, run.progress)
    else:
        reader = Reader(dataset, lambda image, position: crops.crop(image, position, draw=0))
    team = team.of_rows(-(-len(samples) // batch_size))  # no more than it has batches
    params = replicated(team.mesh, encoder.params)
    program = Program(Forward.of(encoder, compute.dtype), team, params, batch_size)
    return Pass(reader, layout, program, parts, images.on_corrupt, run.progress)
