"""`folder:` one sub-folder of images per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.files import Files
from dlc_jax.types import Dataset

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def load_folder(where: str) -> Dataset:
    """Loads `<root>/<class name>/**/<image>`; classes and images in sorted order, hidden ones not.

    Raises:
      ValueError: no such folder, no sub-folder, a class without an image, or a folder that may not
        be read.
    """
    try:
        return _load(where, Path(where).expanduser())
    except OSError as error:  # left alone, os.walk would pass over what it may not read
        raise checks.InputError(f"folder:{where}: cannot be read: {error}.") from error


def _load(where: str, root: Path) -> Dataset:
    if not root.is_dir():
        raise checks.InputError(f"folder:{where}: no such folder.")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise checks.InputError(
            f"folder:{where}: expected one sub-folder of images per class, found none."
        )
    if len(classes) > 1 and set(classes) <= _SPLITS:
        raise checks.InputError(
            f"folder:{where}: its sub-folders are splits ({', '.join(classes)}), not classes; give "
            f"one, folder:{where}/{classes[-1]}, or several, folder:{where}/{'+'.join(classes)}."
        )
    names, labels = [], []
    for label, name in enumerate(classes):
        images = [f"{name}/{image}" for image in _images_below(root / name)]
        if not images:
            raise checks.InputError(
                f"folder:{where}: class {name!r} has no image (looked for {', '.join(SUFFIXES)}). "
                "Add images or remove the folder."
            )
        names += images
        labels += [label] * len(images)
    ids = np.asarray(names, dtype=np.str_)
    return Dataset(
        Files(root, ids), np.asarray(labels, np.int32), ids, tuple(classes), f"folder:{where}"
    )


def _refuse(error: OSError) -> None:
    raise error


def _images_below(folder: Path) -> list[str]:
    """Returns the images at any depth, relative to the folder, in the order of their paths."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = os.path.relpath(parent, folder)
        found += [
            name if below == "." else f"{below}/{name}"
            for name in names
            if name[0] != "." and name.lower().endswith(SUFFIXES)
        ]
    return sorted(found, key=lambda name: name.split("/"))
