"""The passes over the images: class prototypes first, then the losses under every probe.

Samples are dealt out in shards, which number and batch size alone decide, and batches never reach
over the end of one: see `shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float32, Int64
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.distributed import Team, hides_bar
from dlc_jax.preprocess import Reader, in_batches
from dlc_jax.probes.prototypes import ClassSums
from dlc_jax.probes.shards import Arrays, Parts, Result, ShardBatch, shards_done

_SHARD = 2048  # images, or one batch where that is larger
_FEWEST_SHARDS, _MOST_SHARDS = 64, 4096  # enough to deal out, and not too many files
_MOST_BLOCKS = 256  # of shards: class sums are larger than losses
AHEAD = 1  # program calls that are started before the results of one are waited for
Item = TypeVar("Item")


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

    def few_rows(self, team: Team, batch_size: int) -> Team:
        """Returns the team on no more parts of the data axis than it has batches."""
        return team.of_rows(-(-len(self.samples_of(team)) // batch_size))

    def blocks_of(self, team: Team) -> range:
        """Returns the blocks that a team does."""
        return team.share(len(self.blocks))

    def shards_of(self, team: Team) -> range:
        """Returns the shards that a team does, in both passes."""
        mine = self.blocks_of(team)
        return range(
            self.blocks[mine.start].start if mine else 0,
            self.blocks[mine.stop - 1].stop if mine else 0,
        )

    def samples_of(self, team: Team) -> range:
        """Returns the positions that a team reads."""
        mine = self.shards_of(team)
        return range(
            self.shards[mine.start].start if mine else 0,
            self.shards[mine.stop - 1].stop if mine else 0,
        )


def _ranges(num_items: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_items)) for start in range(0, num_items, size)]


class Pass(NamedTuple):
    """What a pass over the images needs.

    Attributes:
      reader: Gives what the program takes.
      layout: How the samples are divided into shards.
      team: Who does which part.
      batch_size: Images per batch and device.
      progress: Whether to show a bar.
    """

    reader: Reader[Any]
    layout: Layout
    team: Team
    batch_size: int
    progress: bool


Program = Callable[[list[ShardBatch]], jax.Array]  # -> [k ...], one row for each of k batches


class Prototypes(NamedTuple):
    """What the first pass found.

    Attributes:
      means: [c, d] mean features of each class, float32.
      positions: [n] positions of the readable samples in the data set.
      skipped: Unreadable samples, position: why.
    """

    means: Float32[np.ndarray, "c d"]
    positions: Int64[np.ndarray, " n"]
    skipped: dict[int, str]


def measure_prototypes(
    work: Pass, features_of: Program, *, on_corrupt: str, parts: Parts
) -> Prototypes:
    """Returns the class means of the unmasked features, and which samples could be read.

    Args:
      work: What to do.
      features_of: Starts the program on a batch for every part of the data axis: [k, b, d].
      on_corrupt: `error` or `skip`.
      parts: Where the sums of each block are kept.
    Raises:
      ValueError: an unreadable sample, or a class that has no readable one.
    """
    dataset, layout = work.reader.dataset, work.layout
    skipped: dict[int, str] | None = {} if on_corrupt == "skip" else None

    def sums_of(blocks: list[int]) -> Iterator[Arrays]:
        shards = [shard for number in blocks for shard in layout.blocks[number]]
        done = _shards_done(work, shards, skipped, features_of, "prototypes")
        for number in blocks:
            sums = ClassSums(dataset.num_classes)
            for results in islice(done, len(layout.blocks[number])):
                for positions, features in results:
                    sums.add(features, dataset.labels[positions])
            lost = _between(skipped, layout, layout.blocks[number])
            yield {**sums.arrays(), **_texts(lost)}

    names = [f"prototypes-{number:04}" for number in range(len(layout.blocks))]
    total, lost = ClassSums(dataset.num_classes), dict[int, str]()
    for found in parts.complete(names, layout.blocks_of(work.team), sums_of):
        total.add_arrays(found)
        lost |= dict(zip(found["skipped"].tolist(), found["why"].tolist(), strict=True))
    readable = np.setdiff1d(np.arange(len(dataset)), list(lost))
    checks.some_readable(dataset.name, len(readable), len(dataset))
    why = " (skipped samples do not count)" if lost else ""
    checks.prototypes_can_differ(dataset.name, dataset.labels[readable], dataset.class_names, why)
    return Prototypes(total.means(), readable, lost)


def measure_losses(
    work: Pass,
    losses_of: Program,
    positions: Int64[np.ndarray, " n"],
    *,
    num_probes: int,
    parts: Parts,
    name: str = "losses",
) -> Float32[np.ndarray, "m n"]:
    """Returns the losses of these samples, all readable, under every probe.

    Args:
      work: What to do.
      losses_of: Starts the program on a batch for every part of the data axis: [k, m, b]; its rows
        may be more than asked for.
      positions: In the data set.
      num_probes: m.
      parts: Where the losses of each shard are kept.
      name: What the names of these parts begin with.
    Raises:
      ValueError: a sample that cannot be read any more.
    """

    def losses_of_shards(shards: list[int]) -> Iterator[Arrays]:
        what = f"{num_probes} probes"
        for results in _shards_done(work, shards, None, losses_of, what, positions, num_probes):
            yield {"losses": _joined(results, (num_probes, 0), axis=1)}

    names = [f"{name}-{number:06}" for number in range(len(work.layout.shards))]
    losses, start = np.empty((num_probes, len(positions)), np.float32), 0
    for found in parts.complete(names, work.layout.shards_of(work.team), losses_of_shards):
        part = found["losses"]
        losses[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    assert start == len(positions)
    return losses


def measure_features(
    work: Pass, features_of: Program, *, on_corrupt: str, parts: Parts
) -> Float32[np.ndarray, "n d"]:
    """Returns the features of every readable sample.

    Args: see `measure_prototypes`.
    Raises:
      ValueError: an unreadable sample, or no readable one.
    """
    dataset = work.reader.dataset
    skipped: dict[int, str] | None = {} if on_corrupt == "skip" else None

    def features_of_shards(shards: list[int]) -> Iterator[Arrays]:
        for results in _shards_done(work, shards, skipped, features_of, "features"):
            yield {"features": _joined(results, (0, 0), axis=0)}

    names = [f"features-{number:06}" for number in range(len(work.layout.shards))]
    every = parts.complete(names, work.layout.shards_of(work.team), features_of_shards)
    found = [part for arrays in every if len(part := arrays["features"])]
    checks.some_readable(dataset.name, len(found), len(dataset))
    return np.concatenate(found)


def _shards_done(
    work: Pass,
    shards: Sequence[int],
    skipped: dict[int, str] | None,
    program: Program,
    what: str,
    readable: Int64[np.ndarray, " n"] | None = None,
    num_probes: int | None = None,
) -> Iterator[list[Result]]:
    """Yields the results of every shard, batch by batch, as they are finished.

    They are features [r, d], or losses [m, r] where `num_probes` is given. Where it is known which
    samples are readable, the others are not asked for.
    """
    ranges = [work.layout.shards[number] for number in shards]
    positions = np.concatenate([np.empty(0, np.int64), *map(np.asarray, ranges)]).astype(np.int64)
    if readable is not None:
        positions = np.intersect1d(positions, readable, assume_unique=True)
    # one reader for all of them: images are decoded on while a shard is finished and kept
    items = work.reader.readable(positions, skipped)
    batches = _batches(items, work.layout, shards, work.batch_size)
    at_once = work.team.mesh.shape["data"]
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

    return shards_done(shards, groups, program, values_of, bar, ahead=AHEAD, bar_step=bar_step)


def _batches(
    items: Iterator[tuple[int, Item]], layout: Layout, shards: Sequence[int], batch_size: int
) -> Iterator[ShardBatch]:
    """Yields batches of which none reaches over the end of a shard."""
    stops = np.array([layout.shards[number].stop for number in shards])
    for place, some in groupby(
        items, lambda item: int(np.searchsorted(stops, item[0], side="right"))
    ):
        for where, values in in_batches(some, batch_size):
            yield ShardBatch(shards[place], where, values)


def _joined(results: list[Result], shape: tuple[int, ...], axis: int) -> np.ndarray:
    values = [of_batch for _, of_batch in results]
    return np.concatenate(values, axis) if values else np.empty(shape, np.float32)


def _between(skipped: dict[int, str] | None, layout: Layout, block: range) -> dict[int, str]:
    start, stop = layout.shards[block.start].start, layout.shards[block.stop - 1].stop
    return {i: why for i, why in sorted((skipped or {}).items()) if start <= i < stop}


def _texts(skipped: dict[int, str]) -> dict[str, np.ndarray]:
    return {
        "skipped": np.array(list(skipped), np.int64),
        "why": np.array(list(skipped.values()), np.str_),
    }
