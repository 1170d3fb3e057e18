"""`folder:` one sub-folder of images per class, and `fgvc_aircraft:`, an archive with lists.

Source of FGVC-Aircraft: Maji et al. 2013, arXiv 1306.5151.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.files import images_in, is_junk, regular, split_in, suffix_of, train_parts
from dlc_jax.datasets.labels import composed, labelled
from dlc_jax.files.image_files import HEIF_SUFFIXES, NEEDS_HEIF, suffixes
from dlc_jax.types import Dataset


def load_folder(where: str) -> Dataset:
    """Loads `<root>/<class name>/**/<image>`; classes and images in sorted order, hidden ones not.

    Classes are named in Unicode's composed form (NFC); two folders of the same name are one class.
    A folder without images is no class; `empty_classes` lists it.

    Raises:
      ValueError: no such folder, no image in a sub-folder, sub-folders that are splits, a class all
        of whose images are HEIC that cannot be read here, or a folder that may not be read.
    """
    with expect.refusing(f"folder:{where}: cannot be read", OSError):
        return _load(where, Path(where).expanduser())


def _load(where: str, root: Path) -> Dataset:
    if not root.is_dir():
        raise expect.InputError(f"folder:{where}: no such folder.")
    entries = [path for path in sorted(root.iterdir()) if not is_junk(path.name)]
    folders = [path.name for path in entries if path.is_dir() and path.name[0] != "."]
    left_out = Counter(suffix_of(path.name) for path in entries if not path.is_dir())
    if not folders:
        raise expect.InputError(
            f"folder:{where}: expected one sub-folder of images per class, found none."
        )
    images = {}
    for name in folders:
        images[name], others = _images_below(root, name)
        if not images[name] and set(others) & set(HEIF_SUFFIXES):
            raise expect.InputError(
                f"folder:{where}: class {name!r} has no image that can be read, but "
                f"{sum(others[suffix] for suffix in HEIF_SUFFIXES)} HEIC; {NEEDS_HEIF}."
            )
        left_out += others
    _check_are_classes(where, images)
    filled = [name for name in folders if images[name]]
    names = np.asarray([image for name in filled for image in images[name]], np.str_)
    return labelled(
        images_in(root, names),
        [name for name in filled for _ in images[name]],
        names,
        f"folder:{where}",
        left_out=dict(left_out),
        empty_classes=tuple(sorted({*map(composed, folders)} - {*map(composed, filled)})),
    )


def _check_are_classes(where: str, images: dict[str, list[str]]) -> None:
    """Raises if there is no image, or if the folders are splits with classes in them."""
    filled = [name for name in images if images[name]]
    if not filled:
        raise expect.InputError(
            f"folder:{where}: no image in its sub-folders {expect.listed(images)} (looked for "
            f"{', '.join(suffixes())})."
        )
    is_nested = all(image.count("/") > 1 for name in filled for image in images[name])
    are_splits = all(map(split_in, filled))
    if len(filled) == 1 or any(split_in(name) != name.lower() for name in filled):
        are_splits &= is_nested  # a class may be called train, or train_station
    if not are_splits:
        return
    parts = train_parts(filled)
    hint = "give one of them that is for training"
    if parts:
        hint = f"give one, folder:{where}/{parts[0]}"
    if len(parts) > 1:
        hint += f", or what is for training, folder:{where}/{'+'.join(parts)}"
    raise expect.InputError(
        f"folder:{where}: its sub-folders are splits ({', '.join(filled)}), not classes; {hint}."
    )


def _refuse(error: OSError) -> None:  # left alone, os.walk would pass over what it may not read
    raise error


def _images_below(root: Path, class_name: str) -> tuple[list[str], Counter[str]]:
    """Returns the images of a class, relative to the root, and what else its folder holds.

    Images at any depth are in the order of their paths; of other files it is the suffixes, and how
    often each occurs.
    """
    found, others, seen = [], Counter[str](), set()
    readable = suffixes()
    for parent, folders, names in os.walk(root / class_name, onerror=_refuse, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if name[0] != "." and not is_junk(name))
        below = os.path.relpath(parent, root)
        for name in itertools.filterfalse(is_junk, names):
            if name[0] == "." or not name.lower().endswith(readable):
                others[suffix_of(name)] += 1
            else:
                found.append(f"{below}/{name}")
    return sorted(found, key=lambda name: name.split("/")), others


def load_aircraft(where: str) -> Dataset:
    """Loads `<root>/<split>`, with `data/images_variant_<split>.txt` below the root.

    Raises:
      ValueError: an unknown split, a list that is not there or a line that is not `<id> <variant>`.
    """
    source = f"fgvc_aircraft:{where}"
    root, _, split = where.rpartition("/")
    expect.one_of(f"{source}: split", split, ("train", "val", "trainval", "test"))
    data = Path(root).expanduser()
    data = data / "data" if (data / "data").is_dir() else data
    names, variants = [], []
    for number, line in enumerate(_lines(source, data / f"images_variant_{split}.txt"), start=1):
        name, space, variant = line.partition(" ")
        if not space or not name.isdigit():
            raise expect.InputError(
                f"{source}: images_variant_{split}.txt, line {number}: expected "
                f"'<id> <variant>', found {line!r}."
            )
        names.append(f"images/{name}.jpg")
        variants.append(variant.strip())
    classes = _lines(source, data / "variants.txt")
    return labelled(images_in(data, names), variants, names, source, classes)


def _lines(source: str, file: Path) -> list[str]:
    with expect.refusing(f"{source}: {file} cannot be read", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise expect.InputError(f"{source}: {file} is empty.")
    return lines
