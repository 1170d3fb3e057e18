"""Parts of a source as one data set, as in `train+validation`."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dlc_jax.types import Dataset, ImageSource, file_of

_SUFFIXES = (".csv", ".tsv", ".npz", ".parquet", ".tar")


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
    """Encoded images that are read when asked for.

    Attributes:
      count: How many there are.
      read: Position -> the image.
    """

    count: int
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> bytes:
        return self.read(position)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined:
    """Images of several sources, one after the other."""

    sources: tuple[ImageSource, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, position: int) -> bytes | np.ndarray:
        source, place = self._part(position)
        return source[place]

    def file(self, position: int) -> Path | None:
        return file_of(*self._part(position))

    def _part(self, position: int) -> tuple[ImageSource, int]:
        part = bisect.bisect_right(self.ends, position)
        return self.sources[part], position - (self.ends[part - 1] if part else 0)


def joined(sources: Sequence[ImageSource]) -> ImageSource:
    """Returns the images of one or more sources, one after the other."""
    ends = np.cumsum([len(source) for source in sources]).tolist()
    return sources[0] if len(sources) == 1 else _Joined(tuple(sources), tuple(ends))


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
