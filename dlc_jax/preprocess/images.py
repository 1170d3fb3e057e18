"""A data set of images with how it is read: crops in a stream, or all in one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from dlc_jax import checks
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.decode import resize_and_crop
from dlc_jax.preprocess.load import CachedReader, Reader, shown, unreadable
from dlc_jax.types import Dataset, overridden

ON_CORRUPT = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set of images with how it is read, where images are probed or fine-tuned on.

    Attributes:
      dataset: From `load_dataset`, or your own `Dataset`.
      size: Side of the images in pixels, 8 or more.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      cache: Where decoded evaluation crops are kept, for later runs too; without one they are
        decoded whenever they are read.
    Raises:
      ValueError: no `Dataset`, or a value out of range.

    Example: `dlc.probe(encoder, dlc.Images(dataset, size=64, cache=dlc.ImageCache()))`.
    """

    dataset: Dataset
    size: int = 224
    on_corrupt: str = "error"
    cache: ImageCache | None = None

    def __post_init__(self) -> None:
        check_dataset("dataset", self.dataset)
        checks.integer("encoder.image_size", self.size)
        checks.at_least("encoder.image_size", self.size, 8)
        if self.cache is not None:
            checks.is_a(ImageCache, cache=self.cache)
        checks.one_of("dataset.on_corrupt", self.on_corrupt, ON_CORRUPT)

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

    def made_of(self, encoder: str, mode: str) -> dict[str, Any]:
        """Returns what decides every measurement of these images, for keys of results.

        Args:
          encoder: Fingerprint of the encoder, as the mode has it.
          mode: `default` or `official`.
        """
        return {
            "dataset": self.dataset.fingerprint,
            "encoder": encoder,
            "image_size": self.size,
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
        reader = Reader(self.dataset, lambda image, _: resize_and_crop(image, self.size))
        part = range(len(self.dataset)) if part is None else part
        if self.cache is None or not part:
            return reader

        def everything() -> Iterator[np.ndarray | str]:
            crops = reader.read(np.asarray(part))
            for crop in shown(crops, "decode", len(part), progress):
                if isinstance(crop, str) and self.on_corrupt == "error":  # not after all the others
                    raise unreadable(self.dataset, crop)
                yield crop

        cached = self.cache.crops(self.dataset, part, self.size, everything)
        return reader if cached is None else CachedReader(self.dataset, cached, part.start)


def check_dataset(name: str, value: object) -> None:
    """Raises ValueError unless the value is a `Dataset`; the name is the caller's for it."""
    if not isinstance(value, Dataset):
        raise checks.InputError(
            f"{name}: expected a Dataset, as from dlc.load_dataset(...), got "
            f"{checks.shortened(repr(value))}."
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
    images = Images(dataset, image_size, on_corrupt, cache)
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
    checks.some_readable(dataset.name, len(positions), len(dataset))
    ids = {str(dataset.ids[position]): why for position, why in skipped.items()}
    return LoadedImages(pixels[: len(positions)], np.asarray(positions, np.int64), ids)
