"""A data set's images as evaluation crops: streamed, from the cache, or all in one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image
from tqdm import tqdm

from dlc_jax import expect
from dlc_jax.distributed import hides_bar
from dlc_jax.preprocess.cache import CachedCrops, ImageCache
from dlc_jax.preprocess.decode import MID_GREY, Item, RandomCrops, decode, in_order
from dlc_jax.preprocess.transform import PAPER, Transform
from dlc_jax.types import Dataset, overridden


def in_batches(
    items: Iterator[tuple[int, Any]], size: int
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Yields positions [k] and items, `size` at a time, the last time perhaps fewer."""
    while some := list(islice(items, size)):
        positions, values = zip(*some, strict=True)
        yield np.asarray(positions, np.int64), list(values)


def filled(rows: Shaped[np.ndarray, "k ..."], size: int) -> Shaped[np.ndarray, "b ..."]:
    """Returns `size` rows: these, and repetitions of them, so that one program fits all batches."""
    return rows if len(rows) == size else rows[np.arange(size) % len(rows)]


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
        except expect.NeedsSetting as error:
            raise expect.NeedsSetting(f"{self.dataset.name}: {error}") from error
        except expect.InputError as error:
            return str(error)
        except (OSError, MemoryError) as error:  # a file that is gone, or that may not be read
            why = str(error) or type(error).__name__
            return f"sample {str(self.dataset.ids[position])!r} cannot be read: {why}"
        try:
            if is_mid_grey(self.dataset, np.asarray(image)):
                self.dataset.mid_grey.add(sample.id)
            return self._of_image(image, position)
        except (expect.InputError, MemoryError) as error:
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


def unreadable(dataset: Dataset, why: str) -> expect.InputError:
    """Returns the error for a sample that must be readable and is not."""
    return expect.InputError(f"{dataset.name}: {why} (on_corrupt='skip' leaves such samples out)")


def shown(items: Iterator[Item], what: str, num: int, progress: bool) -> Iterator[Item]:
    """Returns the items with a bar that counts them, if asked for and on a terminal."""
    return iter(tqdm(items, what, num, unit="img", disable=hides_bar(progress), leave=False))


ON_CORRUPT = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set of images with how it is read, where images are probed or fine-tuned on.

    Attributes:
      dataset: From `load_dataset`, or your own `Dataset`.
      size: Side of the images in pixels, 8 or more; None: that of `transform`.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      cache: Where decoded evaluation crops are kept, for later runs too; without one they are
        decoded whenever they are read.
      transform: How they are prepared; an encoder that is given these images puts its own here.
    Raises:
      ValueError: no `Dataset`, or a value out of range.

    Example: `dlc.probe(encoder, dlc.Images(dataset, size=64, cache=dlc.ImageCache()))`.
    """

    dataset: Dataset
    size: int | None = None
    on_corrupt: str = "error"
    cache: ImageCache | None = None
    transform: Transform = PAPER

    def __post_init__(self) -> None:
        check_dataset("dataset", self.dataset)
        expect.integer("encoder.image_size", self.side, 8)
        expect.is_a(Transform, transform=self.transform)
        if self.cache is not None:
            expect.is_a(ImageCache, cache=self.cache)
        expect.one_of("dataset.on_corrupt", self.on_corrupt, ON_CORRUPT)

    @classmethod
    def of(cls, given: Images | Dataset, image_size: int | None = None) -> Images:
        """Returns what was given as images, of this size if one is named.

        Raises:
          ValueError: neither images nor a data set.
        """
        if not isinstance(given, Images):
            check_dataset("images", given)
            given = cls(given)
        return overridden(given, size=image_size)

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return self.transform.size if self.size is None else self.size

    def random_crops(self, seed: int) -> RandomCrops:
        """Returns what cuts random crops for training; the seed is that of all draws."""
        return RandomCrops(self.dataset, self.side, seed, self.transform.interpolation)

    def made_of(self, encoder: str, mode: str) -> dict[str, Any]:
        """Returns what decides every measurement of these images, for keys of results.

        Args:
          encoder: Fingerprint of the encoder, as the mode has it.
          mode: `default` or `official`.
        """
        return {
            "dataset": self.dataset.fingerprint,
            "encoder": encoder,
            "image_size": self.side,
            "mode": mode,
            "on_corrupt": self.on_corrupt,
        }

    def evaluation_crops(
        self, part: range | None = None, progress: bool = False
    ) -> Reader[np.ndarray]:
        """Returns a reader of uint8 [s, s, 3]: the evaluation transform of every image.

        Without a cache, or if they do not fit, images are decoded whenever they are read.

        Args:
          part: Positions that will be asked for; None: all.
          progress: Whether to show a bar while the cache is filled.
        Raises:
          ValueError: naming the sample, if one cannot be read while the cache is filled.
        """
        reader = Reader(self.dataset, lambda image, _: self.transform(image, self.side))
        part = range(len(self.dataset)) if part is None else part
        if self.cache is None or not part:
            return reader

        def everything() -> Iterator[np.ndarray | str]:
            crops = reader.read(np.asarray(part))
            for crop in shown(crops, "decode", len(part), progress):
                if isinstance(crop, str) and self.on_corrupt == "error":  # not after all the others
                    raise unreadable(self.dataset, crop)
                yield crop

        cached = self.cache.crops(self.dataset, part, self.side, everything, self.transform)
        return reader if cached is None else CachedReader(self.dataset, cached, part.start)


def check_dataset(name: str, value: object) -> None:
    """Raises ValueError unless the value is a `Dataset`; the name is the caller's for it."""
    if not isinstance(value, Dataset):
        raise expect.InputError(
            f"{name}: expected a Dataset, as from dlc.load_dataset(...), got "
            f"{expect.shortened(repr(value))}."
        )


class LoadedImages(NamedTuple):
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
    transform: Transform = PAPER,
) -> LoadedImages:
    """Decodes, resizes and crops every image, into memory or, with a cache, into a mapped file.

    Args:
      dataset: What to read.
      image_size: Side of the crop in pixels, 8 or more.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      progress: Whether to show a bar on the terminal.
      cache: Where decoded crops are kept.
      transform: How images are prepared.
    Raises:
      ValueError: naming the sample, if it cannot be read and `on_corrupt` is `error`; or if no
        sample can be read.
    """
    images = Images(dataset, image_size, on_corrupt, cache, transform)
    reader = images.evaluation_crops(progress=progress)
    everything = np.arange(len(dataset))
    if isinstance(reader, CachedReader) and not reader.cached.problems:
        return LoadedImages(reader.cached.pixels, everything, {})
    pixels = np.empty((len(dataset), image_size, image_size, 3), np.uint8)
    positions: list[int] = []
    skipped: dict[int, str] = {}
    crops = reader.readable(everything, skipped if on_corrupt == "skip" else None)
    for position, crop in shown(crops, "decode", len(dataset), progress):
        pixels[len(positions)] = crop
        positions.append(position)
    expect.some_readable(dataset.name, len(positions), len(dataset))
    ids = {str(dataset.ids[position]): why for position, why in skipped.items()}
    return LoadedImages(pixels[: len(positions)], np.asarray(positions, np.int64), ids)
