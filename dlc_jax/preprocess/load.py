"""A data set's images, each decoded once, on all cores, into one array."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.preprocess.decode import decode, resize_and_crop
from dlc_jax.types import Dataset

ON_CORRUPT = ("error", "skip")


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
    dataset: Dataset, image_size: int, *, on_corrupt: str = "error", progress: bool = False
) -> LoadedImages:
    """Decodes, resizes and crops every image.

    Args:
      dataset: What to read.
      image_size: Side of the crop in pixels.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      progress: Whether to show a bar on the terminal.
    Raises:
      ValueError: naming the sample, if it cannot be read and `on_corrupt` is `error`; or if no
        sample can be read.
    """
    import grain  # a quarter of the package's import time, and only reading images needs it

    checks.one_of("dataset.on_corrupt", on_corrupt, ON_CORRUPT)

    def read(position: int) -> np.ndarray | str:
        try:
            sample = dataset[position]
            return resize_and_crop(decode(sample.image, sample.id), image_size)
        except checks.InputError as error:
            return str(error)
        except OSError as error:  # a file that is gone, or that may not be read
            return f"sample {str(dataset.ids[position])!r} cannot be read: {error}"

    threads = max(os.cpu_count() or 1, 1)
    images = (
        grain.MapDataset.range(len(dataset))
        .map(read)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads))
    )
    pixels = np.empty((len(dataset), image_size, image_size, 3), np.uint8)
    positions: list[int] = []
    skipped: dict[str, str] = {}
    bar = tqdm(
        images, "decode", len(dataset), unit="img", disable=None if progress else True, leave=False
    )
    for position, image in enumerate(bar):
        if isinstance(image, str):
            if on_corrupt == "error":
                raise checks.InputError(
                    f"{dataset.name}: {image} (on_corrupt='skip' leaves such samples out)"
                )
            skipped[str(dataset.ids[position])] = image
            continue
        pixels[len(positions)] = image
        positions.append(position)
    if not positions:
        raise checks.InputError(f"{dataset.name}: none of its {len(dataset)} images is readable.")
    return LoadedImages(pixels[: len(positions)], np.asarray(positions, np.int64), skipped)
