"""How an image is prepared for evaluation: scaled, then cropped at its centre."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dlc_jax import expect

_NAMES = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # timm's
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in _NAMES}
_SIDES = {"center": "", "squash": " both sides to", "border": " longer side to"}  # in words
CROP_MODES = tuple(_SIDES)


@dataclasses.dataclass(frozen=True)
class Transform:
    """The preparation of images that an encoder expects, apart from normalisation.

    Defaults are the paper's: the shorter side scaled to 256 px, the 224 px at the centre.

    Attributes:
      size: Side of the result in pixels, where no other is asked for.
      scaled: Side in pixels that images are scaled to before a crop of `size`, which has a border
        where it is larger; at another size both keep their ratio.
      crop_mode: Which side is scaled to that: `center`, the shorter one; `squash`, both, whatever
        the shape of the image; `border`, the longer one, with a border around the image.
      interpolation: `nearest`, `box`, `bilinear`, `hamming`, `bicubic` or `lanczos`, as Pillow has
        them (antialiased); random crops for training are scaled with it too.
      crop_fraction: Share of the scaled side that is kept, where that and not `scaled` decides at
        other sizes than `size`, rounded down as in timm; None: the ratio of `size` to `scaled`,
        to the nearest pixel.
      rounds_down: Whether a crop half a pixel off the centre is always the upper left one, as in
        transformers; torchvision rounds to even positions.
      border: Colour of the border, RGB of 0 to 255.
      is_asked_for: Whether the user chose it, so that no mode may replace it.
    Raises:
      ValueError: an unknown name, or a value out of range.
    Example:
      >>> transform = dlc.Transform(size=288, scaled=288, interpolation="bicubic")
      >>> str(transform)
      'resize 288, centre crop 288, bicubic'
    """

    size: int = 224
    scaled: int = 256
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    crop_fraction: float | None = None
    rounds_down: bool = False
    border: tuple[int, ...] = (0, 0, 0)
    is_asked_for: bool = dataclasses.field(default=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        expect.integer("transform.size", self.size, 1)
        expect.integer("transform.scaled", self.scaled, 1)
        expect.one_of("transform.crop_mode", self.crop_mode, CROP_MODES)
        expect.one_of("transform.interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop_fraction is not None:
            expect.at_least("transform.crop_fraction", self.crop_fraction, 0, exclusive=True)

    def scaled_side(self, size: int) -> int:
        """Returns the side in pixels that images are scaled to before a crop of this size."""
        if self.crop_fraction is not None:
            return math.floor(size / self.crop_fraction)
        return round(size * self.scaled / self.size)

    def described(self, size: int) -> str:
        """Returns in words all that decides the pixels of a result of this size."""
        side, border = _SIDES[self.crop_mode], self.border if self.crop_mode == "border" else None
        return (
            f"resize{side} {self.scaled_side(size)}, centre crop {size}"
            + (f", {self.interpolation}" if self.interpolation != "bilinear" else "")
            + (", rounded down" if self.rounds_down else "")
            + (f", border {border}" if border else "")
        )

    def __str__(self) -> str:
        return self.described(self.size)

    @property
    def decisive(self) -> tuple[str, float | None]:
        """All that decides pixels at whatever size, for fingerprints."""
        return str(self), self.crop_fraction

    def __call__(self, image: Image.Image, size: int) -> UInt8[np.ndarray, "s s 3"]:
        """Prepares an image.

        The same pixels as timm's or torchvision's transforms on PIL.

        Args:
          image: RGB.
          size: s, side of the result in pixels.
        Raises:
          ValueError: an image so long and thin that, scaled, it has more than PIL's
            MAX_IMAGE_PIXELS.
        """
        width, height = self._scaled_sides(image, self.scaled_side(size))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise expect.InputError(
                f"{image.width} x {image.height} pixels would be scaled to {width} x {height}; "
                f"expected at most {limit} pixels, an image that is not as long and thin."
            )
        if (width, height) != image.size:
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = (self._start(length, size) for length in image.size)
        result = Image.new("RGB", (size, size), self.border)
        result.paste(image, (-left, -top))
        return np.asarray(result)

    def _scaled_sides(self, image: Image.Image, side: int) -> list[int]:
        """Returns width and height of the scaled image."""
        if self.crop_mode == "squash":
            return [side, side]
        if self.crop_mode == "border":
            ratio = max(length / side for length in image.size)
            return [max(1, round(length / ratio)) for length in image.size]
        return [int(side * length / min(image.size)) for length in image.size]

    def _start(self, length: int, size: int) -> int:
        """Returns where the result begins on a scaled side, below 0 by the width of a border."""
        excess = length - size
        if excess < 0:
            return -(-excess // 2)
        return excess // 2 if self.rounds_down else round(excess / 2)


# Of the paper, and of the released code for every encoder.
PAPER = Transform()
