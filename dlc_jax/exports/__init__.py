"""A selection in the form that the next program reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlc_jax import expect
from dlc_jax.exports.images import (
    check_fit_png,
    check_has_files,
    write_hub_folder,
    write_image_folder,
    write_image_links,
    write_parquet,
)
from dlc_jax.exports.lists import (
    PARTS,
    Part,
    check_ids_are_lines,
    part_positions,
    write_ids,
    write_jsonl,
    write_manifest,
    write_positions,
)
from dlc_jax.types import Dataset, Selection, file_of


class Export(NamedTuple):
    """How a form is written, and what its file or folder is called after the part's name.

    Attributes:
      write: Takes the part and where to write; the place is whole or not there at all.
      suffix: Ending of the file name, with its dot; that of a folder's name has none.
      check: Raises ValueError for samples that the form cannot hold; takes the data set and a name
        for the message. Called before scoring.
    """

    write: Callable[[Part, Path], None]
    suffix: str
    check: Callable[[Dataset, str], None] | None = None


EXPORTS: Mapping[str, Export] = {
    "npy": Export(write_positions, ".npy"),
    "ids": Export(write_ids, ".txt", check_ids_are_lines),
    "jsonl": Export(write_jsonl, ".jsonl"),
    "json": Export(write_manifest, ".json"),
    "parquet": Export(write_parquet, ".parquet", check_fit_png),
    "image_folder": Export(write_image_folder, "-images", check_fit_png),
    "image_links": Export(write_image_links, "-links", check_has_files),
    "hf": Export(write_hub_folder, "-hf", check_fit_png),
}
# Of the stage only: its paths tell with what the scores were made, and it reads other files.
RELEASED = "released"
FORMS = (*EXPORTS, RELEASED)


def export(
    dataset: Dataset,
    kept: Selection | np.ndarray | Sequence[int],
    path: str | Path,
    *,
    form: str = "parquet",
    part: str = "kept",
    overwrite: bool = False,
) -> Path:
    """Writes the kept or the dropped samples: both are parts of those that were scored.

    Args:
      dataset: What `kept` was selected from. A selection made with `select(..., ids=...)` finds its
        samples in any order of it, and leaves those alone that were not scored.
      kept: A `Selection`, or positions in the data set, of which then all others are dropped.
      path: File or, for `image_folder`, `image_links` and `hf`, folder to write.
      form: `npy`: positions in the scored order, the rows of `scores.parquet`, int64; `ids`: a line
        of text each; `jsonl`: id, label, class_name and that position; `json`: one manifest, of how
        they were selected, samples per class and ids; `parquet`: images and labels in the Hugging
        Face convention;
        `image_folder`: copies, one sub-folder per class; `image_links`: the same of symbolic links,
        for sources that are files; `hf`: a folder that `datasets` loads.
      part: `kept` or `dropped`.
      overwrite: Whether to replace what is there, all of it.
    Returns:
      The path.
    Raises:
      ValueError: an unknown form or part, `kept` that does not fit the data set (see `finetune`),
        nothing to write, something there already, a sample that cannot be read, or dropped samples
        of a selection that does not know which were scored.
    Example:
      >>> images = np.zeros((3, 8, 8, 3), np.uint8)
      >>> dataset = dlc.array_dataset(images, [0, 0, 1], ids=["a", "b", "c"])
      >>> dlc.export(dataset, [0, 2], "kept.txt", form="ids").read_text().split()
      ['a', 'c']
    """
    path = Path(path).expanduser()
    if form == RELEASED:
        raise expect.InputError(
            f"export form: {form!r} is a form of the stage 'export' only, for its paths tell with "
            f"what the scores were made: --config.export.forms={form}. Expected one of "
            f"{', '.join(EXPORTS)}; exports.released.released_positions gives its positions."
        )
    expect.one_of("export form", form, EXPORTS)
    rows, positions = part_positions(dataset, kept, part, str(path))
    selection = kept if isinstance(kept, Selection) else None
    written = Part(part, dataset.subset(positions), rows, selection)
    if not overwrite and os.path.lexists(path):
        raise expect.InputError(f"{path}: is there already; expected a new name, or overwrite.")
    _check_does_not_hold(path, dataset)
    try:
        EXPORTS[form].write(written, path)
    except OSError as error:
        raise expect.InputError(f"{path}: cannot be written: {error}.") from error
    return path


def _check_does_not_hold(path: Path, dataset: Dataset) -> None:
    """Raises ValueError if the images of the data set are in the folder to be replaced."""
    if not path.is_dir() or path.is_symlink():
        return
    files = (file_of(dataset.images, index) for index in range(len(dataset)))
    folders = {file.parent for file in files if file is not None}
    if any(folder.resolve().is_relative_to(path.resolve()) for folder in folders):
        raise expect.InputError(
            f"{path}: holds images of {dataset.name}, which would be deleted; expected another "
            "place."
        )
