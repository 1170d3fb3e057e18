"""Samples as image files: their bytes, and names that stay where they are put."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from dlc_jax import checks
from dlc_jax.datasets.folder import SUFFIXES
from dlc_jax.preprocess import opened
from dlc_jax.types import Sample

_LONGEST = 200  # bytes of a name; file systems stop at 255


def encoded(sample: Sample) -> bytes:
    """Returns the image's own bytes; arrays as PNG, which loses nothing."""
    if not isinstance(sample.image, np.ndarray):
        return sample.image
    buffer = io.BytesIO()
    pixels = sample.image[:, :, 0] if sample.image.shape[2:] == (1,) else sample.image
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def suffix_of(content: bytes, sample_id: str) -> str:
    """Returns `.jpeg`, `.png`, ... by what the bytes are.

    Raises:
      ValueError: they are no image.
    """
    try:
        with opened(content) as image:
            return f".{(image.format or 'png').lower()}"
    except Exception as error:  # PIL's decoders raise anything from OSError to SyntaxError
        raise checks.InputError(
            f"sample {sample_id!r} is not a readable image: {checks.first_line(error)}"
        ) from error


def file_name(sample_id: str, content: bytes) -> str:
    """Returns a name without folders for an id, which may be a path and may lead anywhere."""
    flat = plain(sample_id.replace("/", "__"))
    if not flat.lower().endswith(SUFFIXES):
        flat += suffix_of(content, sample_id)
    return flat


def plain(name: str) -> str:
    """Returns a name that every file system takes and that leads nowhere else."""
    name = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name)
    name = re.sub(r"^\.+", lambda dots: "_" * len(dots[0]), name) or "_"
    while len(name.encode()) > _LONGEST:
        name = name[1:]  # the end tells more, and holds the suffix
    return name
