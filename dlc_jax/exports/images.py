"""Samples as image files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dlc_jax import checks
from dlc_jax.files.image_files import opened
from dlc_jax.types import Dataset, Sample

# What torchvision.datasets.ImageFolder takes for images; it looks at nothing else of a name.
FOLDER_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
# PIL's names of the formats that have such a suffix.
_SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read(samples: Dataset, index: int) -> Sample:
    """Returns a sample; ValueError, naming it, if its file cannot be read."""
    try:
        return samples[index]
    except OSError as error:
        raise checks.InputError(
            f"{samples.name}: sample {str(samples.ids[index])!r} cannot be read: {error}."
        ) from error


def check_fit_png(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming the sample, for an array that PNG cannot hold.

    Args:
      samples: Samples, of which only arrays are looked at; sources hold either arrays or files.
      where: For the message.
    """
    for index in range(len(samples)):
        try:
            image = samples.images[index]
        except OSError:  # a file, and whether it matters is for the decoder to say
            return
        if not isinstance(image, np.ndarray):
            return
        if not _fits_png(image):
            raise checks.InputError(
                f"{where}: sample {str(samples.ids[index])!r} of {samples.name} {_no_png(image)}"
            )


def _fits_png(image: np.ndarray) -> bool:
    num_channels = image.shape[2] if image.ndim == 3 else 1
    deepest = {"uint8": 4, "uint16": 1}.get(image.dtype.name, 0)  # channels, alpha among them
    return image.ndim in (2, 3) and image.size > 0 and 1 <= num_channels <= deepest


def encoded(sample: Sample) -> bytes:
    """Returns the image's own bytes; arrays as PNG, which loses nothing.

    Raises:
      ValueError: they are no image, or an array that PNG cannot hold.
    """
    image = sample.image
    if isinstance(image, np.ndarray) and not _fits_png(image):
        raise checks.InputError(f"sample {sample.id!r} {_no_png(image)}")
    try:
        if isinstance(image, np.ndarray):
            native = image.astype(image.dtype.newbyteorder("="), copy=False)
            return _png(Image.fromarray(native[:, :, 0] if image.shape[2:] == (1,) else native))
        with opened(image):
            return image
    except Exception as error:  # PIL's decoders raise anything from OSError to SyntaxError
        raise _no_image(sample, error) from error


def as_file(sample: Sample) -> tuple[bytes, str]:
    """Returns the image as a file of an image folder: its bytes, and their suffix there.

    Formats that have no suffix there (GIF, JPEG 2000, AVIF, ...) become PNG of the same pixels, the
    first frame of several; all others keep their bytes.

    Raises:
      ValueError: it is no image.
    """
    content = encoded(sample)
    try:
        with opened(content) as image:
            suffix = _SUFFIXES.get(image.format or "")
            return (content, suffix) if suffix else (_png(image), ".png")
    except Exception as error:
        raise _no_image(sample, error) from error


def _png(image: Image.Image) -> bytes:
    """Encodes the image in its own mode, or as RGB where PNG has no such mode."""
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # describes the colours before conversion
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _no_png(image: np.ndarray) -> str:
    return (
        f"is an array of {image.dtype} {image.shape}, which PNG cannot hold; expected uint8, or "
        "uint16 of one channel."
    )


def _no_image(sample: Sample, error: Exception) -> checks.InputError:
    return checks.InputError(
        f"sample {sample.id!r} is not a readable image: {checks.first_line(error)}"
    )
