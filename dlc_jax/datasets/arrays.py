"""Arrays and lists already in memory as a data set, and `npz:`, arrays in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.files import regular
from dlc_jax.datasets.labels import Columns, labelled
from dlc_jax.files import array_files
from dlc_jax.types import Dataset


def array_dataset(
    images: Sequence[bytes | np.ndarray] | np.ndarray,
    labels: Sequence | np.ndarray,
    ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    *,
    deep_images: str = Dataset.deep_images,
) -> Dataset:
    """Wraps images in memory.

    Args:
      images: Encoded bytes, or uint8 arrays [h, w, 3], [h, w, 1] or [h, w]; one array [n, ...] too.
        Of other numbers `deep_images` decides.
      labels: [n] strings or integers.
      ids: [n] unique names; None takes a hash of the content.
      class_names: Name of label 0, 1, ...; None takes the labels themselves.
      name: For messages.
      deep_images: How more than 8 bits a channel become 8, see `Dataset`.
    Raises:
      ValueError: lengths that differ, duplicate ids, a label without a class name.
    Example:
      >>> images = np.zeros((3, 32, 32, 3), np.uint8)
      >>> dataset = dlc.array_dataset(images, ["cat", "dog", "cat"], ids=["a", "b", "c"])
      >>> dataset.class_names, dataset.labels.tolist()
      (('cat', 'dog'), [0, 1, 0])
    """
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    names = [None] * len(images) if ids is None else expect.as_ids(name, ids)
    return labelled(images, values, names, name, class_names, deep_images=deep_images)


_IMAGES, _LABELS = ("images", "image", "x"), ("labels", "label", "y")


def load_npz(where: str, columns: Columns) -> Dataset:
    """Loads `<file>.npz`: images uint8 [n, h, w, 3], [n, h, w, 1] or [n, h, w], labels [n].

    Images of other numbers are for `Dataset.deep_images` to decide on when they are decoded.
    Optional arrays are `ids` [n] and `class_names` [c]. Pickled objects are refused. The arrays are
    held in memory; other sources are streamed.

    Raises:
      ValueError: no such file, not such arrays, or lengths that differ.
    """
    source = f"npz:{where}"
    problem = f"{source}: cannot be read as arrays"
    with expect.refusing(problem, OSError, ValueError, shown=expect.first_line):
        path = regular(Path(where).expanduser())
        with open(path, "rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it holds one array, expected an archive of several")
    headers = array_files.npz_headers(path)
    images = columns.find(source, "image", list(headers), _IMAGES, noun="array")
    labels = columns.find(source, "label", list(headers), _LABELS, noun="array")
    names = [images, labels, *(name for name in ("ids", "class_names") if name in headers)]
    shape, dtype = headers[images]
    if dtype.kind not in "uif" or len(shape) not in (3, 4):
        raise expect.InputError(
            f"{source}: images are {dtype} {shape}, expected uint8 [n, h, w, 3], [n, h, w, 1] or "
            "[n, h, w]."
        )
    if headers[labels].shape != shape[:1]:
        raise expect.InputError(
            f"{source}: labels have shape {headers[labels].shape}, expected {shape[:1]}."
        )
    for name in names[2:]:
        if len(headers[name].shape) != 1:
            raise expect.InputError(
                f"{source}: {name} have shape {headers[name].shape}, expected one dimension."
            )
        if headers[name].dtype.kind not in "USiu":
            raise expect.InputError(
                f"{source}: {name} are {headers[name].dtype}, expected text or integers."
            )
    num_bytes = sum(headers[name].num_bytes for name in names)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > there:  # a small archive may unpack to anything
        raise expect.InputError(
            f"{source}: its arrays take {num_bytes / 2**30:.3g} GiB of memory, expected at most "
            f"the {there / 2**30:.3g} GiB that there are."
        )
    arrays = array_files.load_npz(path, names)
    texts: dict[str, Any] = {name: _texts(source, name, arrays[name]) for name in names[2:]}
    return array_dataset(arrays[images], arrays[labels], name=source, **texts)


def _texts(source: str, name: str, values: np.ndarray) -> list[str]:
    """Returns names as text; bytes are ASCII."""
    try:
        return values.astype(np.str_).tolist()
    except UnicodeDecodeError as error:
        raise expect.InputError(
            f"{source}: {name} are bytes that are not ASCII ({expect.first_line(error)}), expected "
            "an array of text."
        ) from error
