"""The command `python -m dlc_jax.check`: flags, and how findings are printed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dlc_jax import expect
from dlc_jax.datasets import load_dataset
from dlc_jax.expect import show, visible
from dlc_jax.preprocess.inspection import Findings, inspect
from dlc_jax.types import DEEP_IMAGES
from dlc_jax.workspace import artefacts

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
            raise expect.InputError("--dataset is required, and nothing but flags is taken")
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
    except (expect.InputError, OSError) as error:
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


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a mistake in them ends in one line and exit code 2."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        show(f"error: {' '.join(str(error).split())}", to_stderr=True)
        sys.exit(2)
