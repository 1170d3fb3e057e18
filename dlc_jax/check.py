"""Reads a data set end to end and reports what is wrong with it before anything is run on it.

python -m dlc_jax.check --dataset=folder:/data/flowers/train [--test=folder:/data/flowers/test]

Prints a table, and names what cannot be read or has more than 8 bits a channel; --json=FILE writes
all of it. Exit code 0: nothing found; 1: something to look at; 2: the source cannot be used at all.
"""

from __future__ import annotations

import dlc_jax.signals as signals  # `from dlc_jax` would load all of it first

if __name__ == "__main__":
    signals.listen()

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from dlc_jax import artefacts, checks
from dlc_jax.datasets import load_dataset
from dlc_jax.datasets.guards import Findings, inspect
from dlc_jax.escaping import show, visible
from dlc_jax.types import DEEP_IMAGES

_DATASET = flags.DEFINE_string("dataset", None, "Source to read, required.")
_TEST = flags.DEFINE_string("test", None, "Source that must have no image in common with it.")
_IMAGE = flags.DEFINE_string("image_column", None, "Column of the images; else a usual name.")
_LABEL = flags.DEFINE_string("label_column", None, "Column of the labels; else a usual name.")
_DEEP = flags.DEFINE_enum(
    "deep_images",
    "error",
    DEEP_IMAGES,
    "How more than 8 bits a channel become 8; error lists them.",
)
_MINIMUM = flags.DEFINE_integer("minimum", 5, "Classes with fewer readable images are reported.")
_JSON = flags.DEFINE_string("json", None, "File to write everything found to.")


def main(argv: Sequence[str]) -> None:
    """Reads the data, prints a report and sets the exit code."""
    try:
        if len(argv) > 1 or _DATASET.value is None:
            raise checks.InputError("--dataset is required, and nothing but flags is taken")
        load = functools.partial(
            load_dataset,
            deep_images=_DEEP.value,
            image_column=_IMAGE.value,
            label_column=_LABEL.value,
        )
        dataset = load(_DATASET.value)
        test = load(_TEST.value) if _TEST.value is not None else None
        found = inspect(dataset, test, minimum=_MINIMUM.value, progress=True)
        if _JSON.value is not None:
            artefacts.write_json(Path(_JSON.value).expanduser(), found.to_dict())
    except (checks.InputError, OSError) as error:
        show(f"error: {' '.join(str(error).split())}", to_stderr=True)
        sys.exit(2)
    _print(found)
    sys.exit(0 if found.is_clean else 1)


def _print(found: Findings) -> None:
    for name, number, first in found.rows():
        show(f"{name:<34} {number:>8}  {visible(first)}".rstrip())
    for name, cases in found.to_name().items():
        show(f"{name}:")
        for case in cases:
            show(f"  {visible(case)}")
    print("nothing found" if found.is_clean else "look at these before you prune")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        show(f"error: {' '.join(str(error).split())}", to_stderr=True)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
