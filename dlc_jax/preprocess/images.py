"""A data set of images with how it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.load import ON_CORRUPT, Reader, evaluation_crops
from dlc_jax.types import Dataset, overridden


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
        """Returns a reader of the evaluation transform of every image; see `evaluation_crops`."""
        return evaluation_crops(
            self.dataset,
            self.size,
            on_corrupt=self.on_corrupt,
            cache=self.cache,
            part=part,
            progress=progress,
        )


def check_dataset(name: str, value: object) -> None:
    """Raises ValueError unless the value is a `Dataset`; the name is the caller's for it."""
    if not isinstance(value, Dataset):
        raise checks.InputError(
            f"{name}: expected a Dataset, as from dlc.load_dataset(...), got "
            f"{checks.shortened(repr(value))}."
        )
