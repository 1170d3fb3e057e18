"""From images to losses [m, n]: checks, two passes over the images, the programs that they call.

The first pass gives the prototypes, the second the losses. Samples are dealt out in shards, which
number and batch size alone decide, and batches never reach over the end of one: see `shards`.

`probe` makes a `Pass`, asks `measure_prototypes` and, for the probes of a path, `measure_losses`.
Both leave to `shards.shards_done` what is finished and whose turn it is; the losses of the batches
of a shard are those of `Pass.losses_under`, which calls the program `kernel.losses_of_batches`.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32, Int64, Shaped
from tqdm import tqdm

from dlc_jax import expect
from dlc_jax.distributed import DATA, FSDP, PROBE, Run, Team, hides_bar, replicated
from dlc_jax.encoders import Encoder
from dlc_jax.masking import AUTO, PathSpec
from dlc_jax.preprocess.decode import RandomCrops
from dlc_jax.preprocess.images import Images, Reader, filled, in_batches
from dlc_jax.probes.kernel import (
    DTYPES,
    ClassSums,
    Forward,
    features_of_batches,
    losses_of_batches,
)
from dlc_jax.probes.path import LearningPath, learning_path, measured_path
from dlc_jax.probes.shards import Arrays, Parts, ShardBatch, Start, shards_done
from dlc_jax.types import Conventions, Dataset, Params, ProbeLosses, overridden, setting

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

    def for_encoder(self, encoder: Encoder) -> Compute:
        """Returns itself; for a bundle, with its batch size where that is `auto`, and chunk 1."""
        if encoder.batch_size is None:
            return self
        size = encoder.batch_size if self.batch_size == AUTO else self.batch_size
        return dataclasses.replace(self, batch_size=size, chunk=1)

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
    compute = compute.for_encoder(encoder)
    images = dataclasses.replace(images, transform=encoder.transform)
    encoder.check_image_size(images.side)
    batch_size = compute.images_per_call(images.side)
    decisive = [images.side, batch_size, compute.dtype, images.on_corrupt, mode]
    work = _pass_over("features", encoder, images, compute, run, decisive)
    dataset = images.dataset
    skipped: dict[int, str] | None = {} if work.on_corrupt == "skip" else None

    def features_of_shards(shards: list[int]) -> Iterator[Arrays]:
        for results in _shards_done(work, shards, work.features_of, "features", skipped):
            yield {"features": _joined([batch.items for batch in results], (0, 0), axis=0)}

    every = _complete(work, "features", features_of_shards)
    found = [part for arrays in every if len(part := arrays["features"])]
    expect.some_readable(dataset.name, len(found), len(dataset))
    return np.concatenate(found)


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
      image_size: Side of the images in pixels; None: that of `images`, of a data set that of
        the encoder's `transform`.
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
    compute = compute.for_encoder(encoder)
    images = dataclasses.replace(images, transform=encoder.transform)
    expect.seed(seed)
    encoder.check_image_size(images.side)

    dataset = images.dataset
    expect.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
    batch_size = compute.images_per_call(images.side)
    decisive = [path.schedule, path.step, path.num_probes, path.placement, path.max_sparsity]
    decisive += [path.masking, images.side, batch_size, compute.chunk, compute.dtype, path.augment]
    probes = learning_path(encoder, path, seed, Conventions.of(mode))
    decisive += [images.on_corrupt, seed, mode, *probes.prunable]
    decisive += ["nearest"]  # which parts of earlier versions lack
    crops = images.random_crops(seed) if path.augment else None
    work = _pass_over("losses", encoder, images, compute, run, decisive, crops)
    means, positions, skipped = measure_prototypes(work)
    if crops is not None:
        work = work._replace(reader=Reader(dataset, lambda image, _: image))

    def losses_of(some: LearningPath, suffix: str) -> Arrays:
        chunk = compute.probes_per_call(len(some))
        start = work.losses_under(some, chunk, means, crops)
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


def _pass_over(
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
    batch_size = min(compute.images_per_call(images.side), len(dataset))
    layout = Layout.of(len(dataset), batch_size)
    samples = layout.samples_of(team)
    if crops is None:
        reader = images.evaluation_crops(samples, run.progress)
    else:
        reader = Reader(dataset, lambda image, position: crops.crop(image, position, draw=0))
    team = team.of_rows(-(-len(samples) // batch_size))  # no more than it has batches
    params = replicated(team.mesh, encoder.params)
    forward = Forward.of(encoder, compute.dtype)
    return Pass(
        reader, layout, forward, team, params, batch_size, parts, images.on_corrupt, run.progress
    )


_SHARD = 2048  # images, or one batch where that is larger
_FEWEST_SHARDS, _MOST_SHARDS = 64, 4096  # enough to deal out, and not too many files
_MOST_BLOCKS = 256  # of shards: class sums are larger than losses
AHEAD = 1  # program calls that are started before the results of one are waited for


class Layout(NamedTuple):
    """How samples are dealt out.

    Attributes:
      shards: Ranges of positions; losses are kept shard by shard.
      blocks: Ranges of shards; class sums are kept block by block.
    """

    shards: list[range]
    blocks: list[range]

    @classmethod
    def of(cls, num_samples: int, batch_size: int) -> Layout:
        num_batches = -(-num_samples // batch_size)
        most = max(_SHARD // batch_size, -(-num_batches // _MOST_SHARDS), 1)
        size = min(-(-num_batches // _FEWEST_SHARDS), most) * batch_size
        shards = _ranges(num_samples, size)
        return cls(shards, _ranges(len(shards), -(-len(shards) // _MOST_BLOCKS)))

    def shards_of(self, team: Team) -> range:
        """Returns the shards that a team does, in both passes: those of its blocks."""
        return _covered(self.blocks, team.share(len(self.blocks)))

    def samples_of(self, team: Team) -> range:
        """Returns the positions that a team reads."""
        return _covered(self.shards, self.shards_of(team))


def _ranges(num_items: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_items)) for start in range(0, num_items, size)]


def _covered(ranges: list[range], numbers: range) -> range:
    """Returns what these neighbouring ranges cover together."""
    return range(ranges[numbers[0]].start, ranges[numbers[-1]].stop) if numbers else range(0)


class Pass(NamedTuple):
    """What a pass over the images needs, and the two compiled programs on it.

    Attributes:
      reader: Gives what the program takes.
      layout: How the samples are divided into shards.
      forward: The network.
      team: Processes whose devices run it.
      params: Weights, on all of these.
      batch_size: Images per device and call.
      parts: Where results are kept.
      on_corrupt: `error` or `skip`.
      progress: Whether to show a bar.
    """

    reader: Reader[Any]
    layout: Layout
    forward: Forward
    team: Team
    params: Params
    batch_size: int
    parts: Parts
    on_corrupt: str
    progress: bool

    def features_of(self, batches: list[ShardBatch]) -> jax.Array:
        """Starts on the unmasked features of some batches: [k, b, d]."""
        pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
        return features_of_batches(self.forward, self.team.mesh, self.params, pixels)

    def losses_under(
        self,
        path: LearningPath,
        chunk: int,
        prototypes: Float32[np.ndarray, "c d"],
        crops: RandomCrops | None,
    ) -> Start:
        """Returns what starts on `losses` and `nearest` of some batches: [k, m, b] each.

        Args:
          path: The probes, whose masks are put on the devices.
          chunk: Most probes side by side.
          prototypes: Class means of the unmasked features.
          crops: Cut from items that are decoded images, another one for every probe; None: items
            are pixels, and all probes see the same.
        """
        mesh, num_probes = self.team.mesh, len(path)
        num_parts = mesh.shape[PROBE]
        if crops is None:  # the last probe is repeated until the parts are equal
            chunk = min(chunk, -(-num_probes // num_parts))
            at_once = chunk * num_parts
            num_places = -(-num_probes // at_once) * at_once
            calls = [np.minimum(np.arange(num_places), num_probes - 1)]
        else:  # one at a time
            chunk, calls = 1, [np.full(num_parts, k) for k in range(num_probes)]
        spread = NamedSharding(mesh, PartitionSpec(PROBE))
        thresholds = [jax.device_put(path.thresholds_at(places), spread) for places in calls]
        importance = replicated(mesh, path.importance)
        program = functools.partial(
            losses_of_batches, self.forward, path.prunable, chunk, mesh, self.params, importance
        )
        labels = self.reader.dataset.labels

        def start(batches: list[ShardBatch]) -> dict[str, jax.Array]:
            own = self._side_by_side([labels[batch.positions] for batch in batches])
            if crops is None:
                pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
                losses, nearest = program(thresholds[0], prototypes, pixels, own)
                return {"losses": losses, "nearest": nearest}
            found = []
            for step, threshold in zip(path.steps.tolist(), thresholds, strict=True):
                cut = [crops.cut(batch.items, batch.positions, draw=step + 1) for batch in batches]
                found.append(program(threshold, prototypes, self._side_by_side(cut), own))
            # every part of the probe axis has computed the same
            losses, nearest = (
                jnp.concatenate([rows[:, :1] for rows in of], axis=1)
                for of in zip(*found, strict=True)
            )
            return {"losses": losses, "nearest": nearest}

        return start

    def _side_by_side(self, rows: list[Shaped[np.ndarray, "_ ..."]]) -> jax.Array:
        """Returns one batch for every part of the data axis; missing ones repeat the first."""
        full = [filled(some, self.batch_size) for some in rows]
        full += full[:1] * (self.team.mesh.shape[DATA] - len(full))
        return jax.device_put(np.stack(full), NamedSharding(self.team.mesh, PartitionSpec(DATA)))


# means of the classes, positions of the readable samples, and other positions: why
Prototypes = tuple[Float32[np.ndarray, "c d"], Int64[np.ndarray, " n"], dict[int, str]]


def measure_prototypes(work: Pass) -> Prototypes:
    """Returns the class means of the unmasked features, and which samples could be read.

    Returns:
      The means, the positions of the readable samples in the data set, and for the other positions
      why they cannot be read.
    Raises:
      ValueError: an unreadable sample, or a class that has no readable one.
    """
    dataset, layout = work.reader.dataset, work.layout
    skipped: dict[int, str] | None = {} if work.on_corrupt == "skip" else None

    def sums_of(blocks: list[int]) -> Iterator[Arrays]:
        shards = [shard for number in blocks for shard in layout.blocks[number]]
        done = _shards_done(work, shards, work.features_of, "prototypes", skipped)
        for number in blocks:
            sums = ClassSums(dataset.num_classes)
            for results in islice(done, len(layout.blocks[number])):
                for batch in results:
                    sums.add(batch.items, dataset.labels[batch.positions])
            block = _covered(layout.shards, layout.blocks[number])
            lost = {i: why for i, why in sorted((skipped or {}).items()) if i in block}
            why = np.array(list(lost.values()), np.str_)
            yield {**sums.arrays(), "skipped": np.array(list(lost), np.int64), "why": why}

    names = [f"prototypes-{number:04}" for number in range(len(layout.blocks))]
    mine = work.team.share(len(layout.blocks))
    total, lost = ClassSums(dataset.num_classes), dict[int, str]()
    for found in work.parts.complete(names, mine, sums_of):
        total.add_arrays(found)
        lost |= dict(zip(found["skipped"].tolist(), found["why"].tolist(), strict=True))
    readable = np.setdiff1d(np.arange(len(dataset)), list(lost))
    expect.some_readable(dataset.name, len(readable), len(dataset))
    why = " (skipped samples do not count)" if lost else ""
    expect.prototypes_can_differ(dataset.name, dataset.labels[readable], dataset.class_names, why)
    return total.means(), readable, lost


def measure_losses(
    work: Pass,
    losses_of: Start,
    positions: Int64[np.ndarray, " n"],
    *,
    num_probes: int,
    suffix: str = "",
) -> Arrays:
    """Returns `losses` and `nearest` of these samples, all readable, under every probe: [m, n].

    Args:
      work: What to do.
      losses_of: Starts the program on a batch for every part of the data axis; its rows may be more
        than asked for.
      positions: In the data set.
      num_probes: m.
      suffix: What the names of these parts have behind `losses`.
    Raises:
      ValueError: a sample that cannot be read any more.
    """

    def losses_of_shards(shards: list[int]) -> Iterator[Arrays]:
        what = f"{num_probes} probes"
        for results in _shards_done(work, shards, losses_of, what, None, positions, num_probes):
            yield {
                name: _joined([batch.items[name] for batch in results], (num_probes, 0), axis=1)
                for name in ("losses", "nearest")
            }

    shape, stop = (num_probes, len(positions)), 0
    arrays = {"losses": np.empty(shape, np.float32), "nearest": np.empty(shape, np.int32)}
    for found in _complete(work, f"losses{suffix}", losses_of_shards):
        start, stop = stop, stop + found["losses"].shape[1]
        for name, array in arrays.items():
            array[:, start:stop] = found[name]
    assert stop == len(positions)
    return arrays


def _complete(
    work: Pass, name: str, computed: Callable[[list[int]], Iterator[Arrays]]
) -> Iterator[Arrays]:
    """Returns what is kept of every shard, in order, after what is missing has been computed."""
    names = [f"{name}-{number:06}" for number in range(len(work.layout.shards))]
    return work.parts.complete(names, work.layout.shards_of(work.team), computed)


def _shards_done(
    work: Pass,
    shards: Sequence[int],
    start: Start,
    what: str,
    skipped: dict[int, str] | None,
    readable: Int64[np.ndarray, " n"] | None = None,
    num_probes: int | None = None,
) -> Iterator[list[ShardBatch]]:
    """Yields the batches of every shard with their results as items, as they are finished.

    They are features [r, d], or losses and nearest classes [m, r] where `num_probes` is given.
    Where it is known which samples are readable, the others are not asked for.
    """
    ranges = (work.layout.shards[number] for number in shards)
    positions = np.fromiter(chain.from_iterable(ranges), np.int64)
    if readable is not None:
        positions = np.intersect1d(positions, readable, assume_unique=True)
    # one reader for all of them: images are decoded on while a shard is finished and kept
    items = work.reader.readable(positions, skipped)
    stops = np.array([work.layout.shards[number].stop for number in shards])
    by_shard = groupby(items, lambda item: int(np.searchsorted(stops, item[0], side="right")))
    batches = (  # none reaches over the end of a shard
        ShardBatch(shards[place], where, values)
        for place, some in by_shard
        for where, values in in_batches(some, work.batch_size)
    )
    at_once = work.team.mesh.shape[DATA]
    groups = iter(lambda: list(islice(batches, at_once)), [])
    bar_step = num_probes or 1
    bar = tqdm(
        total=len(positions) * bar_step,
        desc=what,
        unit="img x probe" if num_probes else "img",
        unit_scale=bool(num_probes),
        disable=hides_bar(work.progress),
        leave=bool(num_probes),
    )

    def values_of(arrays: Any, place: int, num: int) -> Any:
        if num_probes is None:
            return arrays[place, :num]
        return {name: array[place, :num_probes, :num] for name, array in arrays.items()}

    return shards_done(shards, groups, start, values_of, bar, ahead=AHEAD, bar_step=bar_step)


def _joined(values: list[np.ndarray], empty: tuple[int, ...], axis: int) -> np.ndarray:
    """Returns the values of all batches; without any, an array of this shape."""
    return np.concatenate(values or [np.empty(empty, np.float32)], axis)
