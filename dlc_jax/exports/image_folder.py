"""A selection as an image folder, of copies or of links: one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dlc_jax import artefacts, checks
from dlc_jax.exports.images import encoded, file_name, plain
from dlc_jax.exports.part import Part
from dlc_jax.types import Dataset, file_of


def write_image_folder(part: Part, path: Path) -> None:
    """Writes `<class name>/<id>`; slashes in ids become `__`.

    Raises:
      ValueError: two classes or two samples of a class would get the same name.
    """
    with artefacts.atomic_folder(path) as root:
        for _, target, content in _targets(part.samples, path, root):
            target.write_bytes(content)


def write_image_links(part: Part, path: Path) -> None:
    """Writes the same with symbolic links to the images where they are.

    Raises:
      ValueError: see `write_image_folder`; or an image that is not a file of its own.
    """
    with artefacts.atomic_folder(path) as root:
        samples = part.samples
        for index, target, _ in _targets(samples, path, root):
            file = file_of(samples.images, index)
            if file is None:
                raise checks.InputError(
                    f"{path}: sample {str(samples.ids[index])!r} of {samples.name} is no file of "
                    "its own to link to; expected a source of files (folder:, csv:, "
                    "fgvc_aircraft:). Use form image_folder, which copies."
                )
            target.symlink_to(file.resolve())


def _targets(samples: Dataset, path: Path, root: Path) -> Iterator[tuple[int, Path, bytes]]:
    """Yields where each sample goes, with its place and content; makes the folders."""
    folders = [plain(name) for name in samples.class_names]
    twice = [name for name in folders if folders.count(name) > 1]
    if twice:
        raise checks.InputError(f"{path}: two classes would both be written to {twice[0]!r}.")
    for index in range(len(samples)):
        sample = samples[index]
        content = encoded(sample)
        target = root / folders[sample.label] / file_name(sample.id, content)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            raise checks.InputError(
                f"{path}: two samples would both be written to {target.name!r}, the second is "
                f"{sample.id!r}."
            )
        yield index, target, content
