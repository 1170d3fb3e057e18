"""Decoding, images of more than 8 bits, random crops, and work on all cores."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image

from dlc_jax import expect
from dlc_jax.files.image_files import bits_per_channel, opened
from dlc_jax.preprocess.transform import INTERPOLATIONS, Transform
from dlc_jax.types import Dataset

Item = TypeVar("Item")
CHOICES = (
    "expected 8 bits a channel; choose dataset.deep_images=full_range (divided by the largest "
    "value of their bits; floats lie in 0..1), min_max (of each image) or clip (as Pillow does: "
    "greys above 255 are white, of colours the high byte is kept)"
)
MID_GREY = 128


def in_order(
    compute: Callable[[int], Item], num: int, *, num_ahead: int | None = None
) -> Iterator[Item]:
    """Yields `compute(0)`, `compute(1)`, ... `compute(num - 1)`, computed on all cores.

    Args:
      compute: Must not depend on the order of its calls.
      num: How many.
      num_ahead: Most results that are under way or wait to be taken; None: eight per thread.
    Raises:
      Exception: what the first failing call raised, when its turn has come.
    """
    num_threads = (os.cpu_count() or 1) + 1  # one more, for when one waits for the disk
    num_ahead = num_ahead or 8 * num_threads
    waiting: collections.deque[Future[Item]] = collections.deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="in_order")
    try:
        for number in range(num):
            waiting.append(pool.submit(compute, number))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def scaled(
    values: Shaped[np.ndarray, "h w ..."], largest: float, deep_images: str
) -> UInt8[np.ndarray, "h w ..."]:
    """Returns 0 to 255, rounded; of a constant image under `min_max` 128 throughout.

    Args:
      values: Integers or floats.
      largest: Divisor of `full_range`: of integers the largest of their bits, of floats 1.
      deep_images: `full_range` or `min_max`, the latter over all channels together.
    Raises:
      NeedsSetting: `full_range`, and values below 0 or above `largest`.
      ValueError: values or a range that are not finite, which no setting helps.
    """
    if not np.all(np.isfinite(values)):
        raise expect.InputError("has pixels that are not finite")
    low, high = float(values.min()), float(values.max())
    found = f"has values from {low:g} to {high:g}"
    if deep_images == "min_max":
        if low == high:
            return np.full(values.shape, MID_GREY, np.uint8)
        factor = 255 / (high - low)
        if not 0 < factor < np.inf:
            raise expect.InputError(f"{found}, expected a range that float64 can hold")
        return np.rint((values.astype(np.float64) - low) * factor).astype(np.uint8)
    if low < 0 or high > largest:
        raise expect.NeedsSetting(
            f"{found}, and dataset.deep_images=full_range expects 0..{largest:g}; choose min_max "
            "or clip"
        )
    return np.rint(values.astype(np.float64) * (255 / largest)).astype(np.uint8)


def in_8_bits(image: Image.Image, content: bytes, bits: int, deep_images: str) -> Image.Image:
    """Returns an encoded image as RGB by `full_range` or `min_max`; alpha is dropped.

    Args:
      image: As opened, not decoded.
      content: The file it is of.
      bits: Stored bits of a channel, more than 8.
      deep_images: How.
    Raises:
      ValueError: see `scaled`; what Pillow cannot give in full depth under `min_max`.
    """
    if image.format == "TIFF" and len(image.getbands()) > 1 and image.tag_v2.get(284) == 2:  # type: ignore[attr-defined]
        raise expect.InputError(
            f"has {bits} bits a channel in separate planes, which Pillow misreads"
        )
    found = _values(image, content, bits)
    if found is not None:
        values, largest = found
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]
            values = largest - values.astype(np.float64)  # 0 is white, which Pillow passes over
        return Image.fromarray(scaled(values, largest, deep_images)).convert("RGB")
    if deep_images == "full_range":  # to within one step of 255
        return image.convert("RGB")
    raise expect.NeedsSetting(
        f"has {bits} bits a channel, of which Pillow gives 8 in {image.format}, too few for "
        "dataset.deep_images=min_max; choose full_range or clip"
    )


def _values(
    image: Image.Image, content: bytes, bits: int
) -> tuple[Shaped[np.ndarray, "h w ..."], float] | None:
    """Returns all stored bits of the pixels, and the largest value; None if they cannot be had."""
    if image.mode == "F":
        return np.asarray(image), 1.0
    if image.mode.startswith("I"):
        return _integers(image, bits)
    tile = image.tile[0] if image.tile else None  # type: ignore[attr-defined]
    if image.format not in ("PNG", "TIFF") or tile is None:
        return None
    rawmode = tile.args if isinstance(tile.args, str) else tile.args[0]
    if rawmode == "LA;16B":  # Pillow's name; the two bytes of grey and of alpha
        both = _decoded_as(content, "RGBA")
        return both[:, :, 0].astype(np.uint16) * 256 + both[:, :, 1], 65535.0
    kind, order = rawmode[:-1], rawmode[-1:]
    others = {"B": "L", "L": "B", "N": "B"}
    if kind not in ("RGB;16", "RGBA;16", "RGBX;16") or order not in others:
        return None
    high, low = (_decoded_as(content, name) for name in (rawmode, kind + others[order]))
    return high[:, :, :3].astype(np.uint16) * 256 + low[:, :, :3], 65535.0


def _integers(image: Image.Image, bits: int) -> tuple[Shaped[np.ndarray, "h w"], float]:
    values = np.asarray(image)
    if image.format == "TIFF":
        is_signed = image.tag_v2.get(339, (1,))[0] == 2  # type: ignore[attr-defined]
        if bits == 32 and not is_signed:  # in Pillow's signed integers
            values = values.view(np.uint32)
        return values, float(2 ** (bits - is_signed) - 1)
    if image.format == "JPEG2000":  # which Pillow shifts up to 16 bits
        return values, float((2**bits - 1) << (16 - bits))
    return values, 65535.0  # PNG; PGM, which Pillow scales to that


def _decoded_as(content: bytes, rawmode: str) -> UInt8[np.ndarray, "h w c"]:
    """Decodes the file with its bytes taken for other channels than they are."""
    with opened(content) as image:
        image.tile = [  # type: ignore[attr-defined]
            tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))
            for tile in image.tile  # type: ignore[attr-defined]
        ]
        return np.asarray(image)


def decode(
    image: bytes | np.ndarray, sample_id: str, deep_images: str = Dataset.deep_images
) -> Image.Image:
    """Returns the image as RGB, exactly as PIL's `convert("RGB")` gives it.

    EXIF orientation is not applied and alpha is dropped, as torchvision's loaders do.

    Args:
      image: Encoded bytes, or an array [h, w, 3], [h, w, 1] or [h, w].
      sample_id: For messages.
      deep_images: What becomes of more than 8 bits a channel, see `Dataset`.
    Raises:
      NeedsSetting: naming the sample, if it is too deep for `deep_images`.
      ValueError: naming the sample, if it is not an image or is truncated.
    """
    try:
        if isinstance(image, np.ndarray):
            return _from_array(image, deep_images)
        with opened(image) as encoded:
            bits = bits_per_channel(encoded, image)
            if bits > 8 and deep_images == "error":
                raise expect.NeedsSetting(f"has {bits} bits a channel, {CHOICES}")
            if bits > 8 and deep_images != "clip":
                return in_8_bits(encoded, image, bits, deep_images)
            if encoded.mode == "RGB":  # converting would copy it
                encoded.load()
                return encoded
            with warnings.catch_warnings():
                # PIL's advice on transparency in palettes; the conversion wanted ignores it
                warnings.filterwarnings("ignore", message="Palette images with Transparency")
                return encoded.convert("RGB")
    except expect.NeedsSetting as error:
        raise expect.NeedsSetting(f"sample {sample_id!r} {error}") from error
    except Exception as error:  # PIL's decoders raise anything from OSError to SyntaxError
        said = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
        raise expect.InputError(
            f"sample {sample_id!r} is not a readable image: {type(error).__name__}: {said}"
        ) from error


def _from_array(image: np.ndarray, deep_images: str) -> Image.Image:
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] <= 4)  # with alpha
    if image.dtype.kind not in "uif" or not is_image or image.size == 0:
        raise ValueError(
            f"expected uint8 [h, w, 3], [h, w, 1] or [h, w], found {image.dtype} {image.shape}"
        )
    if image.dtype != np.uint8:
        if deep_images == "error":
            raise expect.NeedsSetting(
                f"is not a readable image of uint8 but numbers of {image.dtype}, {CHOICES}"
            )
        if deep_images == "clip":
            image = np.clip(np.nan_to_num(image), 0, 255).astype(np.uint8)
        else:
            largest = 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
            colours = image[..., :3] if image.ndim == 3 else image  # without alpha
            image = scaled(colours, largest, deep_images)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(image).convert("RGB")


_RATIO = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """RandomResizedCrop(image_size) and horizontal flip, drawn from (seed, id, draw).

    The distribution is torchvision's; its generator is not, so the draws differ.

    Attributes:
      dataset: Where the images come from.
      image_size: Side of the crop in pixels.
      seed: Seed of all draws.
      interpolation: See `Transform`.
    """

    dataset: Dataset
    image_size: int
    seed: int
    interpolation: str = Transform.interpolation

    def crop(self, image: Image.Image, position: int, draw: int) -> UInt8[np.ndarray, "s s 3"]:
        """Returns draw number `draw` (>= 0) of the image at this position."""
        sample_key = str(self.dataset.ids[position]).encode()
        generator = np.random.default_rng([self.seed, draw, *sample_key])
        box = random_box(generator, image.height, image.width)
        flip = generator.random() < 0.5
        return resized_crop(image, box, flip, self.image_size, self.interpolation)

    def cut(
        self, originals: list[Image.Image], positions: Int64[np.ndarray, " b"], draw: int
    ) -> UInt8[np.ndarray, "b s s 3"]:
        """Returns draw number `draw` (>= 0) of every image, on all cores."""
        pairs = list(zip(originals, positions.tolist(), strict=True))
        return np.stack(list(in_order(lambda i: self.crop(*pairs[i], draw), len(pairs))))


def resized_crop(
    image: Image.Image,
    box: tuple[int, int, int, int],
    flip: bool,
    image_size: int,
    interpolation: str = Transform.interpolation,
) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the box (left, top, right, bottom) at image_size, mirrored if asked.

    The same pixels as torchvision's on PIL.
    """
    crop = image.crop(box).resize((image_size, image_size), INTERPOLATIONS[interpolation])
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
