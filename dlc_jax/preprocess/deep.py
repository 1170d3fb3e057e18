"""Images of more than 8 bits a channel, as the setting `dataset.deep_images` brings them to 8."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dlc_jax import checks
from dlc_jax.files.image_files import opened

CHOICES = (
    "expected 8 bits a channel; choose dataset.deep_images=full_range (divided by the largest "
    "value of their bits; floats lie in 0..1), min_max (of each image) or clip (as Pillow does: "
    "greys above 255 are white, of colours the high byte is kept)"
)
MID_GREY = 128


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
        raise checks.InputError("has pixels that are not finite")
    low, high = float(values.min()), float(values.max())
    found = f"has values from {low:g} to {high:g}"
    if deep_images == "min_max":
        if low == high:
            return np.full(values.shape, MID_GREY, np.uint8)
        factor = 255 / (high - low)
        if not 0 < factor < np.inf:
            raise checks.InputError(f"{found}, expected a range that float64 can hold")
        return np.rint((values.astype(np.float64) - low) * factor).astype(np.uint8)
    if low < 0 or high > largest:
        raise checks.NeedsSetting(
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
        raise checks.InputError(
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
    raise checks.NeedsSetting(
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
