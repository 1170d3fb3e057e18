"""`fgvc_aircraft:` the official archive of FGVC-Aircraft, 100 variants.

Source: Maji et al. 2013, arXiv 1306.5151.
"""

from __future__ import annotations

from pathlib import Path

from dlc_jax import checks
from dlc_jax.datasets.files import images_in, regular
from dlc_jax.datasets.labels import labelled
from dlc_jax.types import Dataset


def load_aircraft(where: str) -> Dataset:
    """Loads `<root>/<split>`, with `data/images_variant_<split>.txt` below the root.

    Raises:
      ValueError: an unknown split, a list that is not there or a line that is not `<id> <variant>`.
    """
    source = f"fgvc_aircraft:{where}"
    root, _, split = where.rpartition("/")
    checks.one_of(f"{source}: split", split, ("train", "val", "trainval", "test"))
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
    return labelled(images_in(data, names), variants, names, source, classes)


def _lines(source: str, file: Path) -> list[str]:
    with checks.refusing(f"{source}: {file} cannot be read", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise checks.InputError(f"{source}: {file} is empty.")
    return lines
