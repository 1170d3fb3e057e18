"""A selection as an image folder, of copies or of links: one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.files import split_in
from dlc_jax.exports.file_names import CLASS_NAMES, ImagePaths, folder_names
from dlc_jax.exports.images import as_file, read
from dlc_jax.exports.part import Part
from dlc_jax.types import Dataset, file_of
from dlc_jax.workspace import artefacts


def write_image_folder(part: Part, path: Path) -> None:
    """Writes `<class name>/<id>`, which `folder:` and torchvision's `ImageFolder` read back.

    Where a file system could not hold a name, or tell two apart, it is changed as little as
    possible; if that is a class's, `class_names.json` has the names of the classes by folder.

    Raises:
      ValueError: a sample that cannot be read.
    """
    with artefacts.atomic_folder(path) as root:
        for _, target, content in _targets(part.samples, root):
            target.write_bytes(content)


def write_image_links(part: Part, path: Path) -> None:
    """Writes the same with symbolic links to the images where they are.

    Raises:
      ValueError: see `write_image_folder`; or an image that is not a file of its own.
    """
    check_has_files(part.samples, str(path))
    with artefacts.atomic_folder(path) as root:
        for index, target, _ in _targets(part.samples, root):
            file = file_of(part.samples.images, index)
            assert file is not None  # checked above
            target.symlink_to(file.resolve())


def check_has_files(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming the sample, unless every image is a file of its own.

    Args:
      samples: None of which is read.
      where: For the message.
    """
    for index in range(len(samples)):
        if file_of(samples.images, index) is None:
            raise checks.InputError(
                f"{where}: sample {str(samples.ids[index])!r} of {samples.name} is no file of "
                "its own to link to; expected a source of files (folder:, csv:, "
                "fgvc_aircraft:). Use form image_folder, which copies."
            )


def _targets(samples: Dataset, root: Path) -> Iterator[tuple[int, Path, bytes]]:
    """Yields where each sample goes, with its place and content; makes the folders."""
    folders = _folders(samples)
    names = {folder: samples.class_names[label] for label, folder in folders.items()}
    if any(folder != name for folder, name in names.items()):
        artefacts.write_json(root / CLASS_NAMES, names)
    paths = ImagePaths()
    for index in range(len(samples)):
        sample = read(samples, index)
        content, suffix = as_file(sample)
        class_name = samples.class_names[sample.label]
        target = root / paths.add(folders[sample.label], class_name, sample.id, suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield index, target, content


def _folders(samples: Dataset) -> dict[int, str]:
    """Returns the folders of the classes that have samples, the same for kept and dropped."""
    all_folders = folder_names(samples.class_names)
    folders = {label: all_folders[label] for label in np.unique(samples.labels).tolist()}
    if all(map(split_in, folders.values())):  # read back, they would be splits
        folders = {label: f"_{folder}" for label, folder in folders.items()}
    return folders
