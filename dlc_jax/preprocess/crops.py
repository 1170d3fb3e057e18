"""Random crops and flips, for fine-tuning and where every probe sees other ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from dlc_jax.types import Dataset

_RATIO = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """RandomResizedCrop(image_size) and horizontal flip, drawn from (seed, id, draw).

    The distribution is torchvision's; its generator is not, so the draws differ.

    Attributes:
      dataset: Where the images come from.
      image_size: Side of the crop in pixels.
      seed: Seed of all draws.
    """

    dataset: Dataset
    image_size: int
    seed: int

    def crop(self, image: Image.Image, position: int, draw: int) -> UInt8[np.ndarray, "s s 3"]:
        """Returns draw number `draw` (>= 0) of the image at this position."""
        sample_key = str(self.dataset.ids[position]).encode()
        generator = np.random.default_rng([self.seed, draw, *sample_key])
        box = random_box(generator, image.height, image.width)
        return resized_crop(image, box, generator.random() < 0.5, self.image_size)

    def cut(
        self, originals: list[Image.Image], positions: Int64[np.ndarray, " b"], draw: int
    ) -> UInt8[np.ndarray, "b s s 3"]:
        """Returns draw number `draw` (>= 0) of every image, on all cores."""
        with ThreadPoolExecutor() as pool:
            crops = pool.map(self.crop, originals, positions.tolist(), itertools.repeat(draw))
            return np.stack(list(crops))


def resized_crop(
    image: Image.Image, box: tuple[int, int, int, int], flip: bool, image_size: int
) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the box (left, top, right, bottom) at image_size, mirrored if asked.

    Bilinear with antialiasing; the same pixels as torchvision's on PIL.
    """
    crop = image.crop(box).resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if flip else pixels


def random_box(
    generator: np.random.Generator, height: int, width: int
) -> tuple[int, int, int, int]:
    """Draws (left, top, right, bottom): area 8 to 100 %, log-uniform aspect ratio 3/4 to 4/3.

    After ten boxes that do not fit, the centre with the nearest allowed ratio.
    Source: Szegedy et al. 2015, arXiv 1409.4842; torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            top = int(generator.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
