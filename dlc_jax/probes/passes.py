"""The two passes over the images: class prototypes first, then the losses under every probe.

Both take images as they come and keep none, and leave what they have behind every few thousand
images, so that a run that was stopped goes on from there to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float32, Int64
from tqdm import tqdm

from dlc_jax import artefacts, checks
from dlc_jax.preprocess import Reader, in_batches, shown
from dlc_jax.probes.prototypes import ClassSums

_SHARD = 2048  # images, or one batch where that is larger
Item = TypeVar("Item")
Tag = TypeVar("Tag")


class Unfinished(NamedTuple):
    """Where the finished parts of an unfinished run are kept; nowhere if the folder is None."""

    folder: Path | None

    def read(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays of a part; none if it is not there or cannot be read."""
        if self.folder is None:
            return {}
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except Exception:  # whatever a damaged file makes NumPy and zipfile raise
            return {}

    def write(self, name: str, **arrays: np.ndarray) -> None:
        """Keeps a part, whole or not at all."""
        if self.folder is not None:
            with artefacts.atomic(self.folder / f"{name}.npz") as file:
                np.savez(file, allow_pickle=False, **arrays)


class Prototypes(NamedTuple):
    """What the first pass found.

    Attributes:
      means: [c, d] of each class, float32.
      positions: [n] of the readable samples in the data set.
      skipped: Unreadable samples, position: why.
    """

    means: Float32[np.ndarray, "c d"]
    positions: Int64[np.ndarray, " n"]
    skipped: dict[int, str]


def measure_prototypes(
    reader: Reader[np.ndarray],
    features_of: Callable[[list[np.ndarray]], jax.Array],
    *,
    batch_size: int,
    on_corrupt: str,
    unfinished: Unfinished,
    progress: bool,
) -> Prototypes:
    """Returns the class means of the unmasked features, and which samples could be read.

    Args:
      reader: Gives pixels.
      features_of: Starts the program on a batch.
      batch_size: Images per batch.
      on_corrupt: `error` or `skip`.
      unfinished: Where the sums are kept until the pass has ended.
      progress: Whether to show a bar.
    Raises:
      ValueError: an unreadable sample, or a class that has no readable one.
    """
    dataset = reader.dataset
    found = unfinished.read("prototypes")
    done = int(found.get("done", 0))
    sums = ClassSums(dataset.num_classes, found.get("sums"), found.get("counts"))
    skipped = dict(zip(found.get("skipped", []), found.get("why", []), strict=True))
    skipped = {int(position): str(why) for position, why in skipped.items()}
    saved = done
    items = reader.readable(
        np.arange(done, len(dataset)), skipped if on_corrupt == "skip" else None
    )
    bar = shown(items, "prototypes", len(dataset) - done, progress)
    batches = in_batches(bar, batch_size)
    for values, where in one_ahead((features_of(pixels), where) for where, pixels in batches):
        sums.add(values[: len(where)], dataset.labels[where])
        done = int(where[-1]) + 1
        if done - saved >= _SHARD:
            saved = done
            _keep(unfinished, sums, done, skipped)
    readable = np.setdiff1d(np.arange(len(dataset)), list(skipped))
    checks.some_readable(dataset.name, len(readable), len(dataset))
    why = " (skipped samples do not count)" if skipped else ""
    checks.prototypes_can_differ(dataset.name, dataset.labels[readable], dataset.class_names, why)
    if saved < len(dataset):
        _keep(unfinished, sums, len(dataset), skipped)
    return Prototypes(sums.means(), readable, skipped)


def _keep(unfinished: Unfinished, sums: ClassSums, done: int, skipped: dict[int, str]) -> None:
    unfinished.write(
        "prototypes",
        done=np.array(done),
        sums=sums.sums,
        counts=sums.counts,
        skipped=np.array(list(skipped), np.int64),
        why=np.array(list(skipped.values()), np.str_),
    )


def measure_losses(
    reader: Reader[Item],
    losses_of: Callable[[list[Item], Int64[np.ndarray, " k"]], jax.Array],
    positions: Int64[np.ndarray, " n"],
    *,
    num_probes: int,
    batch_size: int,
    unfinished: Unfinished,
    progress: bool,
) -> Float32[np.ndarray, "m n"]:
    """Returns the losses of these samples, all readable, under every probe.

    Args:
      reader: Gives what `losses_of` takes.
      losses_of: Starts the program on a batch; its rows and columns may be more than asked for.
      positions: In the data set.
      num_probes: m.
      batch_size: Images per batch.
      unfinished: Where the losses of each shard are kept until the pass has ended.
      progress: Whether to show a bar.
    Raises:
      ValueError: a sample that cannot be read any more.
    """
    size = batch_size * max(_SHARD // batch_size, 1)
    shards = [positions[start : start + size] for start in range(0, len(positions), size)]
    names = [f"losses-{number:06}" for number in range(len(shards))]
    losses = np.empty((num_probes, len(positions)), np.float32)
    missing = []
    for number, name in enumerate(names):
        part = unfinished.read(name).get("losses")
        if part is None:
            missing.append(number)
        else:
            losses[:, number * size : number * size + part.shape[1]] = part
    # one reader for all of them: images are decoded on while a shard is finished and kept
    items = reader.readable(
        np.concatenate([np.empty(0, np.int64), *(shards[i] for i in missing)]), None
    )
    bar = tqdm(
        total=num_probes * sum(len(shards[number]) for number in missing),
        desc=f"{num_probes} probes",
        unit="img x probe",
        unit_scale=True,
        disable=None if progress else True,
    )
    with bar:
        for number in missing:
            batches = in_batches(islice(items, len(shards[number])), batch_size)
            started = ((losses_of(some, where), len(where)) for where, some in batches)
            start = number * size
            for values, real in one_ahead(started):
                losses[:, start : start + real] = values[:num_probes, :real]
                start += real
                bar.update(num_probes * real)
            unfinished.write(names[number], losses=losses[:, number * size : start])
    return losses


def one_ahead(started: Iterable[tuple[jax.Array, Tag]]) -> Iterator[tuple[np.ndarray, Tag]]:
    """Waits for a result only after the next one was started, so that the device is never idle."""
    waiting: list[tuple[jax.Array, Tag]] = []
    for result in started:
        waiting.append(result)
        if len(waiting) > 1:
            array, tag = waiting.pop(0)
            yield np.asarray(array), tag
    for array, tag in waiting:
        yield np.asarray(array), tag
