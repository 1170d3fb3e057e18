"""The passes over the images, and the programs that they call: prototypes, then losses.

Samples are dealt out in shards, which number and batch size alone decide, and batches never reach
over the end of one: see `shards`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32, Int32, Int64, Shaped
from tqdm import tqdm

from dlc_jax import expect
from dlc_jax.distributed import DATA, PROBE, Team, hides_bar, replicated
from dlc_jax.preprocess.decode import RandomCrops
from dlc_jax.preprocess.images import Reader, filled, in_batches
from dlc_jax.probes.kernel import ClassSums, Forward, features_of_batches, losses_of_batches
from dlc_jax.probes.path import LearningPath
from dlc_jax.probes.shards import Arrays, Parts, ShardBatch, Start, shards_done
from dlc_jax.types import Params


class Program(NamedTuple):
    """The two compiled programs with everything that their calls share.

    Attributes:
      forward: The network.
      team: Processes whose devices run it.
      params: Weights, on all of these.
      batch_size: Images per device and call.
    """

    forward: Forward
    team: Team
    params: Params
    batch_size: int

    def features_of(self, batches: list[ShardBatch]) -> jax.Array:
        """Starts on the unmasked features of some batches: [k, b, d]."""
        pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
        return features_of_batches(self.forward, self.team.mesh, self.params, pixels)

    def losses_under(
        self,
        path: LearningPath,
        chunk: int,
        prototypes: Float32[np.ndarray, "c d"],
        labels: Int32[np.ndarray, " n"],
        crops: RandomCrops | None,
    ) -> Start:
        """Returns what starts on the losses of some batches under every probe: [k, m, b].

        Args:
          path: The probes, whose masks are put on the devices.
          chunk: Most probes side by side.
          prototypes: Class means of the unmasked features.
          labels: Class ids of the whole data set.
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

        def under_all(batches: list[ShardBatch]) -> jax.Array:
            pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
            return program(thresholds[0], prototypes, pixels, labels_of(batches))

        def under_each(batches: list[ShardBatch]) -> jax.Array:
            assert crops is not None
            own, rows = labels_of(batches), []
            for step, threshold in zip(path.steps.tolist(), thresholds, strict=True):
                cut = [crops.cut(batch.items, batch.positions, draw=step + 1) for batch in batches]
                losses = program(threshold, prototypes, self._side_by_side(cut), own)
                rows.append(losses[:, :1])  # every part of the probe axis has computed the same
            return jnp.concatenate(rows, axis=1)

        def labels_of(batches: list[ShardBatch]) -> jax.Array:
            return self._side_by_side([labels[batch.positions] for batch in batches])

        return under_all if crops is None else under_each

    def _side_by_side(self, rows: list[Shaped[np.ndarray, "_ ..."]]) -> jax.Array:
        """Returns one batch for every part of the data axis; missing ones repeat the first."""
        full = [filled(some, self.batch_size) for some in rows]
        full += full[:1] * (self.team.mesh.shape[DATA] - len(full))
        return jax.device_put(np.stack(full), NamedSharding(self.team.mesh, PartitionSpec(DATA)))


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


# means of the classes, positions of the readable samples, and other positions: why
Prototypes = tuple[Float32[np.ndarray, "c d"], Int64[np.ndarray, " n"], dict[int, str]]


class Pass(NamedTuple):
    """What a pass over the images needs.

    Attributes:
      reader: Gives what the program takes.
      layout: How the samples are divided into shards.
      program: What is run, and by whom.
      parts: Where results are kept.
      on_corrupt: `error` or `skip`.
      progress: Whether to show a bar.
    """

    reader: Reader[Any]
    layout: Layout
    program: Program
    parts: Parts
    on_corrupt: str
    progress: bool


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
        done = _shards_done(work, shards, work.program.features_of, "prototypes", skipped)
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
    mine = work.program.team.share(len(layout.blocks))
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
) -> Float32[np.ndarray, "m n"]:
    """Returns the losses of these samples, all readable, under every probe.

    Args:
      work: What to do.
      losses_of: Starts the program on a batch for every part of the data axis: [k, m, b]; its rows
        may be more than asked for.
      positions: In the data set.
      num_probes: m.
      suffix: What the names of these parts have behind `losses`.
    Raises:
      ValueError: a sample that cannot be read any more.
    """

    def losses_of_shards(shards: list[int]) -> Iterator[Arrays]:
        what = f"{num_probes} probes"
        for results in _shards_done(work, shards, losses_of, what, None, positions, num_probes):
            yield {"losses": _joined(results, (num_probes, 0), axis=1)}

    losses, stop = np.empty((num_probes, len(positions)), np.float32), 0
    for found in _complete(work, f"losses{suffix}", losses_of_shards):
        start, stop = stop, stop + found["losses"].shape[1]
        losses[:, start:stop] = found["losses"]
    assert stop == len(positions)
    return losses


def measure_features(work: Pass) -> Float32[np.ndarray, "n d"]:
    """Returns the features of every readable sample.

    Raises:
      ValueError: an unreadable sample, or no readable one.
    """
    dataset = work.reader.dataset
    skipped: dict[int, str] | None = {} if work.on_corrupt == "skip" else None

    def features_of_shards(shards: list[int]) -> Iterator[Arrays]:
        for results in _shards_done(work, shards, work.program.features_of, "features", skipped):
            yield {"features": _joined(results, (0, 0), axis=0)}

    every = _complete(work, "features", features_of_shards)
    found = [part for arrays in every if len(part := arrays["features"])]
    expect.some_readable(dataset.name, len(found), len(dataset))
    return np.concatenate(found)


def _complete(
    work: Pass, name: str, computed: Callable[[list[int]], Iterator[Arrays]]
) -> Iterator[Arrays]:
    """Returns what is kept of every shard, in order, after what is missing has been computed."""
    names = [f"{name}-{number:06}" for number in range(len(work.layout.shards))]
    return work.parts.complete(names, work.layout.shards_of(work.program.team), computed)


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

    They are features [r, d], or losses [m, r] where `num_probes` is given. Where it is known which
    samples are readable, the others are not asked for.
    """
    ranges = (work.layout.shards[number] for number in shards)
    positions = np.fromiter(chain.from_iterable(ranges), np.int64)
    if readable is not None:
        positions = np.intersect1d(positions, readable, assume_unique=True)
    # one reader for all of them: images are decoded on while a shard is finished and kept
    items = work.reader.readable(positions, skipped)
    batches = _batches(items, work.layout, shards, work.program.batch_size)
    at_once = work.program.team.mesh.shape[DATA]
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

    def values_of(array: np.ndarray, place: int, num: int) -> np.ndarray:
        return array[place, :num] if num_probes is None else array[place, :num_probes, :num]

    return shards_done(shards, groups, start, values_of, bar, ahead=AHEAD, bar_step=bar_step)


def _batches(
    items: Iterator[tuple[int, Any]], layout: Layout, shards: Sequence[int], batch_size: int
) -> Iterator[ShardBatch]:
    """Yields batches of which none reaches over the end of a shard."""
    stops = np.array([layout.shards[number].stop for number in shards])
    by_shard = groupby(items, lambda item: int(np.searchsorted(stops, item[0], side="right")))
    for place, some in by_shard:
        for where, values in in_batches(some, batch_size):
            yield ShardBatch(shards[place], where, values)


def _joined(results: list[ShardBatch], empty: tuple[int, ...], axis: int) -> np.ndarray:
    """Returns the values of all batches; without any, an array of this shape."""
    values = [batch.items for batch in results] or [np.empty(empty, np.float32)]
    return np.concatenate(values, axis)
