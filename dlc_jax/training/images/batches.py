"""What a step is fed: shuffled, augmented on the host, padded to one shape, a few steps ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped
from PIL import Image

from dlc_jax import checks
from dlc_jax.preprocess import decode, filled, in_order
from dlc_jax.training.order import epoch_order
from dlc_jax.types import Dataset

# what the network sees of the samples at k positions in an epoch
Inputs = Callable[[Int64[np.ndarray, " k"], int], Shaped[np.ndarray, "k ..."]]
_STEPS_AHEAD = 8


class Batch(NamedTuple):
    """One step's samples; a short batch is filled up with repetitions that do not count."""

    inputs: Shaped[np.ndarray, "b ..."]
    labels: Int32[np.ndarray, " b"]
    real: Float32[np.ndarray, " b"]

    @classmethod
    def padded(
        cls, inputs: Shaped[np.ndarray, "k ..."], labels: Int32[np.ndarray, " k"], num_rows: int
    ) -> Batch:
        real = (np.arange(num_rows) < len(labels)).astype(np.float32)
        return cls(filled(inputs, num_rows), filled(labels, num_rows), real)


class DecodedImages:
    """A data set's decoded images, kept from first use on as long as they fit."""

    def __init__(self, dataset: Dataset, max_bytes: float):
        self._dataset = dataset
        self._kept: dict[int, Image.Image] = {}
        self._bytes_left = max_bytes
        self._lock = threading.Lock()

    def __getitem__(self, position: int) -> Image.Image:
        """Raises ValueError, naming the sample, if it is not a readable image."""
        if position in self._kept:
            return self._kept[position]
        try:
            sample = self._dataset[position]
        except OSError as error:
            name = str(self._dataset.ids[position])
            raise checks.InputError(f"sample {name!r} cannot be read: {error}") from error
        image = decode(sample.image, sample.id, self._dataset.deep_images)
        size = 4 * image.width * image.height  # PIL spends four bytes on a pixel
        with self._lock:
            if position not in self._kept and size <= self._bytes_left:
                self._bytes_left -= size
                self._kept[position] = image
        return image


def training_batches(
    inputs: Inputs,
    positions: Int64[np.ndarray, " k"],
    labels: Int32[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rows: range | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """Yields the batches of an epoch; (seed, epoch) decide order and augmentation.

    Args:
      inputs: What to feed.
      positions: Samples to train on.
      labels: Class ids of the whole data set.
      batch_size: Samples per batch; the last one may hold fewer real ones.
      seed, epoch: The only source of randomness.
      rows: The rows of a batch to make, of which it may have more than samples; None: a row for
        each sample.
      first: Batches to leave out at the beginning.
    """
    order = epoch_order(positions, seed, epoch)[first * batch_size :]
    rows = range(batch_size) if rows is None else rows

    def batch(number: int) -> Batch:
        where = order[number * batch_size : (number + 1) * batch_size]
        if rows.start == 0:
            where = where[: len(rows)]
            return Batch.padded(inputs(where, epoch), labels[where], len(rows))
        mine = np.asarray(rows)
        places, again = np.unique(mine % len(where), return_inverse=True)
        real = (mine < len(where)).astype(np.float32)
        return Batch(inputs(where[places], epoch)[again], labels[where[places]][again], real)

    yield from in_order(batch, -(-len(order) // batch_size), num_ahead=_STEPS_AHEAD)
