"""A selection in the form that the next program reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import expect
from dlc_jax.exports.forms import EXPORTS, PARTS, Export, Part, part_positions
from dlc_jax.types import Dataset, Selection, file_of

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
    with expect.refusing(f"{path}: cannot be written", OSError):
        EXPORTS[form].write(written, path)
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
