"""A data set's images as evaluation crops: streamed, from the cache, or all in one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.distributed import hides_bar
from dlc_jax.preprocess.cache import CachedCrops, ImageCache
from dlc_jax.preprocess.decode import decode, resize_and_crop
from dlc_jax.preprocess.deep import MID_GREY
from dlc_jax.preprocess.threads import in_order
from dlc_jax.types import Dataset

ON_CORRUPT = ("error", "skip")
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


class _CachedReader(Reader[np.ndarray]):
    """Evaluation crops that the cache has, from the position `first` on."""

    def __init__(self, dataset: Dataset, cached: CachedCrops, first: int = 0):
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


def evaluation_crops(
    dataset: Dataset,
    image_size: int,
    *,
    on_corrupt: str = "error",
    cache: ImageCache | None = None,
    part: range | None = None,
    progress: bool = False,
) -> Reader[np.ndarray]:
    """Returns a reader of uint8 [s, s, 3]: the evaluation transform of every image.

    Args:
      dataset: What to read.
      image_size: s, in pixels.
      on_corrupt: Whether filling the cache stops at an unreadable image (`error`) or not (`skip`).
      cache: Where decoded crops are kept. Without one, or if they do not fit, images are decoded
        whenever they are read.
      part: Positions that will be asked for; None: all.
      progress: Whether to show a bar while the cache is filled.
    Raises:
      ValueError: naming the sample, if one cannot be read while the cache is filled.
    """
    reader = Reader(dataset, lambda image, _: resize_and_crop(image, image_size))
    part = range(len(dataset)) if part is None else part
    if cache is None or not part:
        return reader

    def everything() -> Iterator[np.ndarray | str]:
        crops = reader.read(np.asarray(part))
        for crop in shown(crops, "decode", len(part), progress):
            if isinstance(crop, str) and on_corrupt == "error":  # now, not after all the others
                raise unreadable(dataset, crop)
            yield crop

    cached = cache.crops(dataset, part, image_size, everything)
    return reader if cached is None else _CachedReader(dataset, cached, part.start)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedImages:
    """Pixels of the readable samples.

    Attributes:
      pixels: Evaluation crops.
      positions: Where in the data set each of them stands, ascending.
      skipped: Unreadable samples, id: why.
    """

    pixels: UInt8[np.ndarray, "n s s 3"]
    positions: Int64[np.ndarray, " n"]
    skipped: dict[str, str]


def load_images(
    dataset: Dataset,
    image_size: int,
    *,
    on_corrupt: str = "error",
    progress: bool = False,
    cache: ImageCache | None = None,
) -> LoadedImages:
    """Decodes, resizes and crops every image, into memory or, with a cache, into a mapped file.

    Args:
      dataset: What to read.
      image_size: Side of the crop in pixels.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      progress: Whether to show a bar on the terminal.
      cache: Where decoded crops are kept.
    Raises:
      ValueError: naming the sample, if it cannot be read and `on_corrupt` is `error`; or if no
        sample can be read.
    """
    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)
    reader = evaluation_crops(
        dataset, image_size, on_corrupt=on_corrupt, cache=cache, progress=progress
    )
    everything = np.arange(len(dataset))
    if isinstance(reader, _CachedReader) and not reader.cached.problems:
        return LoadedImages(reader.cached.pixels, everything, {})
    pixels = np.empty((len(dataset), image_size, image_size, 3), np.uint8)
    positions: list[int] = []
    skipped: dict[int, str] = {}
    crops = reader.readable(everything, skipped if on_corrupt == "skip" else None)
    for position, crop in shown(crops, "decode", len(dataset), progress):
        pixels[len(positions)] = crop
        positions.append(position)
    checks.some_readable(dataset.name, len(positions), len(dataset))
    ids = {str(dataset.ids[position]): why for position, why in skipped.items()}
    return LoadedImages(pixels[: len(positions)], np.asarray(positions, np.int64), ids)


def shown(items: Iterator[Item], what: str, num: int, progress: bool) -> Iterator[Item]:
    """Returns the items with a bar that counts them, if asked for and on a terminal."""
    hidden = hides_bar(progress)
    return iter(tqdm(items, what, num, unit="img", disable=hidden, leave=False))
