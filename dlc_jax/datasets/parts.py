"""Parts of a source as one data set, as in `train+validation`."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax.datasets.files import LazyImages
from dlc_jax.types import Dataset, ImageSource, file_of

_SUFFIXES = (".csv", ".tsv", ".npz", ".parquet", ".tar")


def joined(sources: Sequence[ImageSource]) -> ImageSource:
    """Returns the images of one or more sources, one after the other."""
    if len(sources) == 1:
        return sources[0]
    starts = np.cumsum([0, *map(len, sources)]).tolist()

    def place(position: int) -> tuple[ImageSource, int]:
        number = bisect.bisect_right(starts, position) - 1
        return sources[number], position - starts[number]

    def read(position: int) -> bytes | np.ndarray:
        source, inner = place(position)
        return source[inner]

    return LazyImages(starts[-1], read, lambda position: file_of(*place(position)))


def part_sources(where: str) -> list[str]:
    """Returns the sources that `<place>/<part>+<part>` stands for; one where it has no parts.

    A suffix of the last part is that of all: `lists/train+val.csv`.
    """
    place, slash, last = where.rpartition("/")
    if "+" not in last or Path(where).expanduser().exists():
        return [where]
    suffix = Path(last).suffix
    if suffix.lower() not in _SUFFIXES:  # of v1.0+v1.1, the .1 is none
        suffix = ""
    return [f"{place}{slash}{part.removesuffix(suffix)}{suffix}" for part in last.split("+")]


def concatenate(parts: Sequence[Dataset], names: Sequence[str], source: str) -> Dataset:
    """Returns all samples in order; classes are matched by name, and a part may lack some.

    Args:
      parts: Data sets.
      names: Names that tell ids apart where an id occurs in two of the data sets.
      source: Name of the result.
    """
    class_names = parts[0].class_names
    if any(part.class_names != class_names for part in parts):
        united = {name for part in parts for name in part.class_names}
        numbers = sorted(filter(str.isdecimal, united), key=lambda name: (int(name), name))
        class_names = (*numbers, *sorted(united - {*numbers}))
    places = {name: label for label, name in enumerate(class_names)}
    labels = [np.array([places[n] for n in p.class_names], np.int32)[p.labels] for p in parts]
    ids = [part.ids.tolist() for part in parts]
    if len(set().union(*ids)) < sum(map(len, ids)):
        ids = [[f"{name}/{i}" for i in mine] for name, mine in zip(names, ids, strict=True)]
    tables = {key: new for part in parts for key, new in (part.label_table or {}).items()}
    return Dataset(
        images=joined([part.images for part in parts]),
        labels=np.concatenate(labels),
        ids=np.asarray([name for mine in ids for name in mine], np.str_),
        class_names=class_names,
        name=source,
        label_table={key: places[str(key)] for key in tables} or None,
        left_out=dict(sum((Counter(part.left_out) for part in parts), Counter())),
        empty_classes=tuple(sorted({n for p in parts for n in p.empty_classes} - {*class_names})),
    )
