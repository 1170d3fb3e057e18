"""`fgvc_aircraft:` the official archive of FGVC-Aircraft, 100 variants.

Source: Maji et al. 2013, arXiv 1306.5151.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.files import Files, regular
from dlc_jax.datasets.labels import encode_labels, stable_ids
from dlc_jax.types import Dataset

_SPLITS = ("train", "val", "trainval", "test")


def load_aircraft(where: str) -> Dataset:
    """Loads `<root>/<split>`, with `data/images_variant_<split>.txt` below the root.

    Raises:
      ValueError: an unknown split, a list that is not there or a line that is not `<id> <variant>`.
    """
    source = f"fgvc_aircraft:{where}"
    root, _, split = where.rpartition("/")
    checks.one_of(f"{source}: split", split, _SPLITS)
    data = Path(root).expanduser()
    data = data / "data" if (data / "data").is_dir() else data
    names, variants = [], []
    for number, line in enumerate(_lines(source, data / f"images_variant_{split}.txt"), start=1):
        name, space, variant = line.partition(" ")
        if not space or not name.isdigit():
            raise checks.InputError(
                f"{source}: images_variant_{split}.txt, line {number}: expected "
                f"'<id> <variant>', found {line!r}."
            )
        names.append(f"images/{name}.jpg")
        variants.append(variant.strip())
    classes = _lines(source, data / "variants.txt")
    images = Files(data, np.asarray(names, np.str_))
    labels = encode_labels(variants, classes, source)
    return Dataset(images, labels.ids, stable_ids(names, images), labels.class_names, source)


def _lines(source: str, file: Path) -> list[str]:
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise checks.InputError(f"{source}: {file} cannot be read: {error}.") from error
    if not any(lines):
        raise checks.InputError(f"{source}: {file} is empty.")
    return [line for line in lines if line]
