"""`npz:` NumPy arrays of images and labels in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.arrays import array_dataset
from dlc_jax.datasets.files import regular
from dlc_jax.types import Dataset

_IMAGES, _LABELS = ("images", "image", "x"), ("labels", "label", "y")


def load_npz(where: str) -> Dataset:
    """Loads `<file>.npz`: images uint8 [n, h, w, 3], [n, h, w, 1] or [n, h, w], labels [n].

    Images of other numbers are for `Dataset.deep_images` to decide on when they are decoded.
    Optional arrays are `ids` [n] and `class_names` [c]. Pickled objects are refused. The arrays are
    held in memory; other sources are streamed.

    Raises:
      ValueError: no such file, not such arrays, or lengths that differ.
    """
    source = f"npz:{where}"
    try:
        loaded = np.load(regular(Path(where).expanduser()), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one array, expected an archive of several")
        with loaded as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise anything, MemoryError for a false shape
        raise checks.InputError(
            f"{source}: cannot be read as arrays: {checks.first_line(error)}."
        ) from error
    images, labels = _pick(source, arrays, _IMAGES), _pick(source, arrays, _LABELS)
    if images.dtype.kind not in "uif" or images.ndim not in (3, 4):
        raise checks.InputError(
            f"{source}: images are {images.dtype} {images.shape}, expected uint8 [n, h, w, 3], "
            "[n, h, w, 1] or [n, h, w]."
        )
    if labels.ndim != 1 or len(labels) != len(images):
        raise checks.InputError(
            f"{source}: labels have shape {labels.shape}, expected ({len(images)},)."
        )
    for name in ("ids", "class_names"):
        if name in arrays and arrays[name].ndim != 1:
            raise checks.InputError(
                f"{source}: {name} have shape {arrays[name].shape}, expected one dimension."
            )
    names = arrays.get("class_names")
    return array_dataset(
        images,
        labels,
        ids=arrays["ids"].tolist() if "ids" in arrays else None,
        class_names=[str(name) for name in names] if names is not None else None,
        name=source,
    )


def _pick(source: str, arrays: dict[str, np.ndarray], usual: tuple[str, ...]) -> np.ndarray:
    for name in usual:
        if name in arrays:
            return arrays[name]
    raise checks.InputError(
        f"{source}: no array named {' or '.join(usual)}, found {', '.join(arrays) or 'none'}."
    )
