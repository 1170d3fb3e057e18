"""A data set's images one by one: decoded, or from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.distributed import hides_bar
from dlc_jax.preprocess.cache import CachedCrops
from dlc_jax.preprocess.decode import decode
from dlc_jax.preprocess.deep import MID_GREY
from dlc_jax.preprocess.threads import in_order
from dlc_jax.types import Dataset

Item = TypeVar("Item")


class Reader(Generic[Item]):
    """Gives samples in the form that `of_image` makes of them; nothing is kept.

    Args:
      dataset: What to read.
      of_image: Takes a decoded image and its position; runs on all cores.
    """

    def __init__(self, dataset: Dataset, of_image: Callable[[Image.Image, int], Item]):
        self.dataset = dataset
        self._of_image = of_image

    def read(self, positions: Int64[np.ndarray, " k"]) -> Iterator[Item | str]:
        """Yields what was made of the image at each position, or why there is none."""
        return in_order(lambda place: self._one(int(positions[place])), len(positions))

    def _one(self, position: int) -> Item | str:
        try:
            sample = self.dataset[position]
            image = decode(sample.image, sample.id, self.dataset.deep_images)
        except checks.NeedsSetting as error:
            raise checks.NeedsSetting(f"{self.dataset.name}: {error}") from error
        except checks.InputError as error:
            return str(error)
        except (OSError, MemoryError) as error:  # a file that is gone, or that may not be read
            why = str(error) or type(error).__name__
            return f"sample {str(self.dataset.ids[position])!r} cannot be read: {why}"
        try:
            if is_mid_grey(self.dataset, np.asarray(image)):
                self.dataset.mid_grey.add(sample.id)
            return self._of_image(image, position)
        except (checks.InputError, MemoryError) as error:
            return f"sample {sample.id!r} cannot be used: {str(error) or type(error).__name__}"

    def readable(
        self, positions: Int64[np.ndarray, " k"], skipped: dict[int, str] | None
    ) -> Iterator[tuple[int, Item]]:
        """Yields the readable ones of these positions, with what `read` gives.

        Args:
          positions: In the data set.
          skipped: Takes the others, position: why; None makes them an error.
        Raises:
          ValueError: naming the sample, if it cannot be read and `skipped` is None.
        """
        for position, item in zip(positions.tolist(), self.read(positions), strict=True):
            if not isinstance(item, str):
                yield position, item
            elif skipped is None:
                raise unreadable(self.dataset, item)
            else:
                skipped[position] = item


class CachedReader(Reader[np.ndarray]):
    """Evaluation crops that the cache has, from the position `first` on."""

    def __init__(self, dataset: Dataset, cached: CachedCrops, first: int):
        self.dataset, self.cached, self._first = dataset, cached, first

    def read(self, positions: Int64[np.ndarray, " k"]) -> Iterator[np.ndarray | str]:
        for place in (positions - self._first).tolist():
            if is_mid_grey(self.dataset, self.cached.pixels[place]):
                self.dataset.mid_grey.add(str(self.dataset.ids[place + self._first]))
            yield self.cached.problems.get(place) or self.cached.pixels[place]


def is_mid_grey(dataset: Dataset, pixels: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether `min_max` found nothing to stretch: other images have a 0 and a 255."""
    return dataset.deep_images == "min_max" and bool(np.all(pixels == MID_GREY))


def unreadable(dataset: Dataset, why: str) -> checks.InputError:
    """Returns the error for a sample that must be readable and is not."""
    return checks.InputError(f"{dataset.name}: {why} (on_corrupt='skip' leaves such samples out)")


def shown(items: Iterator[Item], what: str, num: int, progress: bool) -> Iterator[Item]:
    """Returns the items with a bar that counts them, if asked for and on a terminal."""
    return iter(tqdm(items, what, num, unit="img", disable=hides_bar(progress), leave=False))
