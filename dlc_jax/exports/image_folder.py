"""A selection as an image folder: one sub-folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dlc_jax import artefacts, checks
from dlc_jax.exports.images import encoded, file_name, plain
from dlc_jax.types import Dataset


def write_image_folder(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes `<class name>/<id>`; slashes in ids become `__`.

    Raises:
      ValueError: two classes or two samples of a class would get the same name.
    """
    folders = [plain(name) for name in samples.class_names]
    twice = [name for name in folders if folders.count(name) > 1]
    if twice:
        raise checks.InputError(f"{path}: two classes would both be written to {twice[0]!r}.")
    with artefacts.atomic_folder(path) as root:
        for index in range(len(samples)):
            sample = samples[index]
            content = encoded(sample)
            file = root / folders[sample.label] / file_name(sample.id, content)
            file.parent.mkdir(exist_ok=True)
            if file.exists():
                raise checks.InputError(
                    f"{path}: two samples would both be written to {file.name!r}, the second is "
                    f"{sample.id!r}."
                )
            file.write_bytes(content)
