"""From images to losses [m, n]: checks, sets up the two passes, and calls the two programs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from dlc_jax import checks
from dlc_jax.distributed import FSDP, PROBE, Team
from dlc_jax.encoders import Encoder
from dlc_jax.masking import AUTO, MASKINGS, check_path, path_counts
from dlc_jax.preprocess import (
    ON_CORRUPT,
    ImageCache,
    RandomCrops,
    Reader,
    evaluation_crops,
)
from dlc_jax.probes.kernel import DTYPES
from dlc_jax.probes.parts import Parts
from dlc_jax.probes.passes import (
    Layout,
    Pass,
    measure_features,
    measure_losses,
    measure_prototypes,
)
from dlc_jax.probes.path import LearningPath, learning_path
from dlc_jax.probes.program import Masks, Program
from dlc_jax.probes.rounds import check_agreement, until_it_ranks
from dlc_jax.types import Dataset, ProbeLosses
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts

_BATCH_SIZE = 128
_PIXELS_IN_CACHE = 16 * 224**2
# What `schedule=None` means in each mode.
SCHEDULE_OF_MODE = {"default": "linear", "official": "geometric"}


def features(
    encoder: Encoder,
    dataset: Dataset,
    *,
    image_size: int = 224,
    batch_size: int | str = AUTO,
    dtype: str = "float32",
    mode: str = "default",
    on_corrupt: str = "error",
    cache: ImageCache | None = None,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float32[np.ndarray, "n d"]:
    """Returns the unmasked encoder's pooled features of every sample, not normalised.

    Args: see `probe`. With `on_corrupt="skip"` unreadable samples have no row.
    Raises:
      ValueError: see `probe`.
    """
    checks.one_of("probe.dtype", dtype, DTYPES)
    batch_size = resolve_batch_size(batch_size, image_size)
    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)
    encoder = encoder.for_mode(mode)
    encoder.check_image_size(image_size)
    decisive = ["features", image_size, batch_size, dtype, on_corrupt, mode]
    parts = _parts(folder, encoder, dataset, decisive)
    layout = Layout.of(len(dataset), batch_size)
    team = layout.few_rows(_team(mesh, parts), batch_size)
    reader = evaluation_crops(
        dataset,
        image_size,
        on_corrupt=on_corrupt,
        cache=cache,
        part=layout.samples_of(team),
        progress=progress,
    )
    program = Program.on(team, encoder, dtype, min(batch_size, len(dataset)))
    work = Pass(reader, layout, team, batch_size, progress)
    return measure_features(work, program.features_of, on_corrupt=on_corrupt, parts=parts)


def probe(
    encoder: Encoder,
    dataset: Dataset,
    *,
    schedule: str | None = None,
    step: float = 0.02,
    num_probes: int | str = 50,
    placement: str = "grid",
    max_sparsity: float = 1.0,
    agreement: float = 0.98,
    masking: str = "l1",
    image_size: int = 224,
    batch_size: int | str = AUTO,
    chunk: int | str = "auto",
    dtype: str = "float32",
    augment: bool = False,
    on_corrupt: str = "error",
    cache: ImageCache | None = None,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
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
      num_probes: m; with placement `grid`, the first m steps of the path. `auto`: 5 midpoints of
        the whole path, and three times as many as long as `certify` does not find them enough.
      placement: `grid`, or `midpoint` to spread `num_probes` over the whole path.
      max_sparsity: Cuts the path there, in (0, 1].
      agreement: With `auto`: the lower end of Spearman's interval that is enough, in (0, 1].
      masking: `l1`, magnitude, or `random`.
      image_size: Side of the images in pixels.
      batch_size: Samples per program call and device; changes speed and memory, not the losses.
        `auto`: 128, and on CPUs fewer of larger images (16 at 224 px), which stay in the cache.
      chunk: Most probes side by side, or `auto`; changes speed and memory, not the losses.
      dtype: What the network computes in, `float32` or `bfloat16`; distances are float32.
      augment: Whether each probe sees a fresh random crop and flip, as in the released code.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      cache: Where decoded images are kept, for later runs too; without one every image is decoded
        twice. Not used with `augment`.
      folder: Where what is finished is kept until all of it is, so that the same call goes on from
        there if it was stopped, with other devices too; yours to remove afterwards. Processes of
        `jax.distributed` that are given the same mesh and folder share the work, and all return
        all of it. None: nowhere.
      mesh: Devices, from `make_mesh`: batches are divided among its axis `data`, probes among
        `probe`; changes speed, not the losses. None: the default device.
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
    batch_size = resolve_batch_size(batch_size, image_size)
    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)
    checks.seed(seed)
    check_agreement(agreement)
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
    decisive = [schedule, step, num_probes, placement, max_sparsity, masking, image_size]
    decisive += [batch_size, chunk, dtype, augment, on_corrupt, seed, mode]
    parts = _parts(folder, encoder, dataset, decisive)
    layout = Layout.of(len(dataset), batch_size)
    team = layout.few_rows(_team(mesh, parts), batch_size)
    path = learning_path(encoder, counts, masking, seed, mode)
    crops = RandomCrops(dataset, image_size, seed) if augment else None
    if crops is None:
        pixels = evaluation_crops(
            dataset,
            image_size,
            on_corrupt=on_corrupt,
            cache=cache,
            part=layout.samples_of(team),
            progress=progress,
        )
    else:
        pixels = Reader(dataset, lambda image, position: crops.crop(image, position, draw=0))
    program = Program.on(team, encoder, dtype, min(batch_size, len(dataset)))
    work = Pass(pixels, layout, team, batch_size, progress)
    found = measure_prototypes(work, program.features_of, on_corrupt=on_corrupt, parts=parts)
    if crops is not None:
        work = work._replace(reader=Reader(dataset, lambda image, _: image))

    def losses_of(some: LearningPath) -> Float32[np.ndarray, "k n"]:
        masks = Masks.on(team, some, resolve_chunk(chunk, len(some)), crops is not None)
        started = functools.partial(program.losses_of, masks, found.means, dataset.labels)
        if crops is not None:
            started = functools.partial(
                program.losses_under_crops, masks, found.means, dataset.labels, crops
            )
        name = "losses" if num_probes != AUTO else f"losses-{some.name}"
        return measure_losses(
            work, started, found.positions, num_probes=len(some), parts=parts, name=name
        )

    labels = dataset.labels[found.positions]
    if num_probes == AUTO:
        path, losses = until_it_ranks(path, losses_of, labels, agreement)
    else:
        losses = losses_of(path)
    ids = dataset.ids if not found.skipped else dataset.ids[found.positions]
    checks.losses_are_finite(losses, ids)
    return ProbeLosses(
        losses=losses,
        sparsity=path.sparsity,
        labels=labels,
        ids=ids,
        prototypes=found.means,
        class_names=dataset.class_names,
        skipped={str(dataset.ids[position]): why for position, why in found.skipped.items()},
        steps=path.steps,
        num_steps=path.num_steps,
    )


def _parts(
    folder: str | Path | None, encoder: Encoder, dataset: Dataset, decisive: list[Any]
) -> Parts:
    """Returns where that is kept which this encoder, data set, program and machine give."""
    if folder is None:
        return Parts()
    device = jax.devices()[0]
    machine = (jax.__version__, device.platform, device.device_kind)
    inputs = (__version__, machine, encoder.fingerprint, dataset.fingerprint, decisive)
    return Parts(Path(folder) / artefacts.json_hash(inputs)[:16])


def _team(mesh: Mesh | None, parts: Parts) -> Team:
    """Returns who does which part.

    Raises:
      ValueError: a mesh that these programs cannot use, or processes without a folder to share.
    """
    team = Team.alone() if mesh is None else Team.of(mesh)
    if team.mesh.shape[FSDP] > 1:
        raise checks.InputError(
            f"mesh.fsdp: {team.mesh.shape[FSDP]}; expected 1: it spreads the weights of a language "
            "model."
        )
    if team.mesh.is_multi_process:
        raise checks.InputError(
            f"mesh.probe: {team.mesh.shape[PROBE]} parts of the probes are more than the devices "
            "of a process; expected a divisor of their number, so that no two processes read the "
            "same images."
        )
    if team.num_teams > 1 and parts.folder is None:
        raise checks.InputError(
            "folder: missing; processes that share the work need one that all of them see."
        )
    return team


def resolve_batch_size(batch_size: int | str, image_size: int) -> int:
    """Returns how many images a program call takes; see `probe`.

    Source of `auto`: BUILD_NOTES, "A device per core".
    """
    if batch_size != AUTO:
        if isinstance(batch_size, str):
            raise checks.InputError(
                f"probe.batch_size: expected {AUTO!r} or an integer >= 1, got {batch_size!r}."
            )
        checks.at_least("probe.batch_size", batch_size, 1)
        return batch_size
    if jax.default_backend() != "cpu":
        return _BATCH_SIZE
    return max(1, min(_BATCH_SIZE, _PIXELS_IN_CACHE // max(image_size, 1) ** 2))


def resolve_chunk(chunk: int | str, num_probes: int | str) -> int:
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
    if isinstance(num_probes, str):
        return chunk
    most = min(chunk, num_probes)
    return min(range(most, most // 2, -1), key=lambda c: -num_probes % c)
