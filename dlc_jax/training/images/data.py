"""What runs read: training images or features in batches of one shape, and the test set."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8
from PIL import Image

from dlc_jax import expect
from dlc_jax.datasets.labels import composed
from dlc_jax.preprocess.decode import decode, in_order
from dlc_jax.preprocess.images import Images, Reader, filled, in_batches, load_images
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.optimiser import epoch_order
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
        name = str(self._dataset.ids[position])
        with expect.refusing(f"sample {name!r} cannot be read", OSError, end=""):
            sample = self._dataset[position]
        image = decode(sample.image, sample.id, self._dataset.deep_images)
        size = 4 * image.width * image.height  # PIL spends four bytes on a pixel
        with self._lock:
            if position not in self._kept and size <= self._bytes_left:
                self._bytes_left -= size
                self._kept[position] = image
        return image


class TestSet(NamedTuple):
    """Inputs of the network, their classes, and samples left out as unreadable, id: why."""

    dataset: Dataset
    inputs: Shaped[np.ndarray, "n ..."]
    labels: Int32[np.ndarray, " n"]
    skipped: dict[str, str]


class RunData:
    """Inputs for every run on one data set; what two runs need is decoded once.

    Args:
      images: What is trained on.
      settings: Decides between random crops, evaluation crops and features.
      to_features: Images uint8 [b, s, s, 3] to features [b, d], before any training.
      progress: Whether to show bars.
    """

    def __init__(
        self,
        images: Images,
        settings: FinetuneConfig,
        to_features: Callable[[np.ndarray], jax.Array],
        progress: bool,
    ):
        self._to_features = to_features
        self._images, self._dataset, self._settings = images, images.dataset, settings
        self._progress = progress
        self._is_augmented = settings.augment and not settings.linear_probe
        self._decoded = DecodedImages(images.dataset, settings.image_memory_gib * 2**30)
        self._fixed: dict[int, np.ndarray] = {}  # crops or features, by position

    def training_inputs(self, positions: Int64[np.ndarray, " k"], seed: int) -> Inputs:
        """Returns what the network sees of these samples in training."""
        if self._is_augmented:
            crops = self._images.random_crops(seed)
            return lambda positions, epoch: np.stack(
                [crops.crop(self._decoded[i], i, epoch) for i in positions.tolist()]
            )
        missing = np.array([i for i in positions.tolist() if i not in self._fixed], np.int64)
        if len(missing):
            some = self._dataset.subset(missing)
            loaded = load_images(
                some,
                self._images.side,
                progress=self._progress,
                transform=self._images.transform,
            )
            rows = self._as_inputs(loaded.pixels)
            self._fixed.update(zip(missing.tolist(), rows, strict=True))
        return lambda positions, _: np.stack([self._fixed[i] for i in positions.tolist()])

    def batches(
        self, positions: Int64[np.ndarray, " k"], seed: int, epoch: int, first: int, rows: range
    ) -> Iterator[Batch]:
        """Yields the batches of an epoch; (seed, epoch) decide order and augmentation.

        Args:
          positions: Samples to train on; the last batch may hold fewer real ones.
          seed, epoch: The only source of randomness.
          first: Batches to leave out at the beginning.
          rows: The rows of a batch to make, of which it may have more than samples.
        """
        inputs, labels = self.training_inputs(positions, seed), self._dataset.labels
        size = self._settings.batch_size
        order = epoch_order(positions, seed, epoch)[first * size :]

        def batch(number: int) -> Batch:
            where = order[number * size : (number + 1) * size]
            if rows.start == 0:
                where = where[: len(rows)]
                return Batch.padded(inputs(where, epoch), labels[where], len(rows))
            mine = np.asarray(rows)
            places, again = np.unique(mine % len(where), return_inverse=True)
            real = (mine < len(where)).astype(np.float32)
            return Batch(inputs(where[places], epoch)[again], labels[where[places]][again], real)

        yield from in_order(batch, -(-len(order) // size), num_ahead=_STEPS_AHEAD)

    def evaluation_inputs(
        self, positions: Int64[np.ndarray, " k"]
    ) -> Iterator[Shaped[np.ndarray, "b ..."]]:
        """Yields evaluation crops of these samples, or their features, a batch at a time."""
        if self._is_augmented:
            rows = self._crops.readable(positions, None)
        else:
            self.training_inputs(positions, seed=0)  # fills `_fixed`
            rows = ((i, self._fixed[i]) for i in positions.tolist())
        for _, some in in_batches(rows, self._settings.batch_size):
            yield np.stack(some)

    def readable(self) -> tuple[Int64[np.ndarray, " k"], dict[str, str]]:
        """Returns the positions of samples that can be read, and of others the id: why.

        Raises:
          ValueError: there is no readable one.
        """
        skipped: dict[int, str] = {}
        everything = np.arange(len(self._dataset))
        positions = [i for i, _ in self._crops.readable(everything, skipped)]
        expect.some_readable(self._dataset.name, len(positions), len(everything))
        ids = {str(self._dataset.ids[i]): why for i, why in skipped.items()}
        return np.asarray(positions, np.int64), ids

    @functools.cached_property
    def _crops(self) -> Reader[np.ndarray]:
        # unreadable samples are found when they are read, and refused or skipped then
        images = dataclasses.replace(self._images, on_corrupt="skip")
        return images.evaluation_crops(progress=self._progress)

    def test_set(self, test: Dataset) -> TestSet:
        """Returns evaluation crops, or their features, with the training set's class ids.

        They are read as the training images are.

        Raises:
          ValueError: a class that training does not know, an unreadable image.
        """
        labels = class_ids_by_name(test, self._dataset)
        loaded = load_images(
            test,
            self._images.side,
            on_corrupt=self._images.on_corrupt,
            progress=self._progress,
            cache=self._images.cache,
            transform=self._images.transform,
        )
        inputs = self._as_inputs(loaded.pixels)
        return TestSet(test, inputs, labels[loaded.positions], loaded.skipped)

    def _as_inputs(self, pixels: UInt8[np.ndarray, "n s s 3"]) -> Shaped[np.ndarray, "n ..."]:
        """Returns the pixels, or their features where only the head is trained."""
        if not self._settings.linear_probe:
            return pixels
        size = self._settings.batch_size
        parts = (pixels[start : start + size] for start in range(0, len(pixels), size))
        found = [np.asarray(self._to_features(filled(some, size))) for some in parts]
        return np.concatenate(found)[: len(pixels)]


def class_ids_by_name(test: Dataset, dataset: Dataset) -> Int32[np.ndarray, " n"]:
    """Returns the test labels as the training set numbers its classes.

    By name, since a split that lacks a class numbers the others differently; however Unicode writes
    it. Classes without test samples do not matter.

    Raises:
      ValueError: a class that training does not know.
    """
    places = {composed(name): label for label, name in enumerate(dataset.class_names)}
    test = test.without_empty_classes()
    unknown = [name for name in test.class_names if composed(name) not in places]
    if unknown:
        raise expect.InputError(
            f"dataset.test: {test.name} has classes that {dataset.name} has not: "
            f"{expect.listed(map(_told_apart, unknown))}; expected only "
            f"{expect.listed(map(_told_apart, dataset.class_names))}."
        )
    return np.array([places[composed(name)] for name in test.class_names], np.int32)[test.labels]


def _told_apart(name: str) -> str:
    """Returns a class name, and its code points too where others may look the same."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"
