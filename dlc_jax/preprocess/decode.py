"""Decoding, and the evaluation transform: Resize(round(s 256 / 224)), CenterCrop(s)."""

from __future__ import annotations

import re
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dlc_jax import checks
from dlc_jax.files.image_files import bits_per_channel, opened
from dlc_jax.preprocess.deep import CHOICES, in_8_bits, scaled
from dlc_jax.types import Dataset


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
                raise checks.NeedsSetting(f"has {bits} bits a channel, {CHOICES}")
            if bits > 8 and deep_images != "clip":
                return in_8_bits(encoded, image, bits, deep_images)
            if encoded.mode == "RGB":  # converting would copy it
                encoded.load()
                return encoded
            with warnings.catch_warnings():
                # PIL's advice on transparency in palettes; the conversion wanted ignores it
                warnings.filterwarnings("ignore", message="Palette images with Transparency")
                return encoded.convert("RGB")
    except checks.NeedsSetting as error:
        raise checks.NeedsSetting(f"sample {sample_id!r} {error}") from error
    except Exception as error:  # PIL's decoders raise anything from OSError to SyntaxError
        said = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
        raise checks.InputError(
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
            raise checks.NeedsSetting(
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


def resize_and_crop(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the centre of the image, its shorter side scaled to image_size 256 / 224.

    Bilinear with antialiasing; the same pixels as torchvision's Resize and CenterCrop on PIL.

    Args:
      image: RGB.
      image_size: s, in pixels.
    Raises:
      ValueError: an image so long and thin that, scaled, it has more than PIL's MAX_IMAGE_PIXELS.
    """
    side = round(image_size * 256 / 224)
    width, height = (int(side * length / min(image.size)) for length in image.size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise checks.InputError(
            f"{image.width} x {image.height} pixels would be scaled to {width} x {height}; "
            f"expected at most {limit} pixels, an image that is not as long and thin."
        )
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((length - image_size) / 2) for length in image.size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
