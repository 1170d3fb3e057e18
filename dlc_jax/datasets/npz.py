"""`npz:` NumPy arrays of images and labels in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.arrays import array_dataset
from dlc_jax.datasets.columns import USUAL, Columns, column
from dlc_jax.datasets.files import regular
from dlc_jax.types import Dataset

_IMAGES, _LABELS = ("images", "image", "x"), ("labels", "label", "y")


def load_npz(where: str, columns: Columns = USUAL) -> Dataset:
    """Loads `<file>.npz`: images uint8 [n, h, w, 3], [n, h, w, 1] or [n, h, w], labels [n].

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
    names = list(arrays)
    images = arrays[column(source, "image", names, _IMAGES, columns.image, noun="array")]
    labels = arrays[column(source, "label", names, _LABELS, columns.label, noun="array")]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
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
    class_names = arrays.get("class_names")
    return array_dataset(
        images,
        labels,
        ids=arrays["ids"].tolist() if "ids" in arrays else None,
        class_names=[str(name) for name in class_names] if class_names is not None else None,
        name=source,
    )
