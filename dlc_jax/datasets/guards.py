"""What is wrong with a data set: unreadable and repeated images, small classes, odd sizes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from dlc_jax import checks
from dlc_jax.preprocess import decode, in_order, shown
from dlc_jax.types import Dataset

# Smallest over largest class, and sides in pixels, beyond which a person should look.
_IMBALANCE = 0.1
_SMALL_SIDE, _LARGE_SIDE, _LONG_RATIO = 32, 8192, 5.0


@dataclasses.dataclass(frozen=True)
class Findings:
    """What `inspect` found; ids are those of the data set, test ids begin with `test:`.

    Attributes:
      num_samples: Read, or tried to.
      unreadable: Id -> why.
      duplicates: Groups of ids within the data set (or within the test set) of the same content.
      across: Groups of ids of the same content in both, training first.
      conflicting: Groups of duplicates with different labels.
      small_classes: Class name -> readable images, where fewer than the minimum.
      imbalance: Readable images of the smallest class over those of the largest.
      odd_sizes: Id -> size, where a side is under 32 or over 8192 pixels or five times the other.
    """

    num_samples: int
    unreadable: dict[str, str]
    duplicates: list[list[str]]
    across: list[list[str]]
    conflicting: list[list[str]]
    small_classes: dict[str, int]
    imbalance: float
    odd_sizes: dict[str, str]

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to look at."""
        return all(number == 0 for name, number, _ in self.rows() if name != "samples")

    def rows(self) -> list[tuple[str, int, str]]:
        """Returns what was looked for, how often it was found, and the first case."""
        lists = (
            ("unreadable", self.unreadable),
            ("repeated content (groups)", self.duplicates),
            ("repeated under other labels", self.conflicting),
            ("in training and test (groups)", self.across),
            ("classes under the minimum", self.small_classes),
            ("odd sizes", self.odd_sizes),
        )
        rows = [("samples", self.num_samples, "")]
        for name, found in lists:
            pairs = (
                found.items() if isinstance(found, dict) else [(" = ".join(g), "") for g in found]
            )
            first = next((f"{key} {value}".strip() for key, value in pairs), "")
            rows.append((name, len(found), first if len(first) <= 100 else first[:97] + "..."))
        uneven = self.imbalance < _IMBALANCE
        said = f"smallest class over largest: {self.imbalance:.3f}" if uneven else ""
        return [*rows, ("label imbalance", int(uneven), said)]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, for JSON."""
        return dataclasses.asdict(self)


class _Read(NamedTuple):
    """What is kept of an image."""

    id: str
    is_test: bool
    label: str
    digest: str
    size: tuple[int, int] | None
    problem: str | None


def inspect(
    dataset: Dataset, test: Dataset | None = None, *, minimum: int = 5, progress: bool = False
) -> Findings:
    """Reads and decodes every image once.

    Args:
      dataset: What to look at.
      test: What must not have images in common with it.
      minimum: Classes of fewer readable images are told.
      progress: Whether to show a bar on the terminal.
    Raises:
      ValueError: a minimum below 1.
    """
    checks.at_least("minimum", minimum, 1)
    train = list(_read(dataset, False, progress))
    both = train + (list(_read(test, True, progress)) if test is not None else [])
    by_content = defaultdict(list)
    for row in both:
        by_content[row.digest].append(row)
    groups = [group for group in by_content.values() if len(group) > 1]
    within, across = [], []
    for group in groups:
        sides = [[r for r in group if r.is_test == is_test] for is_test in (False, True)]
        within += [[row.id for row in side] for side in sides if len(side) > 1]
        if all(sides):
            across.append([row.id for side in sides for row in side])
    readable = Counter(row.label for row in train if row.problem is None)
    sizes = {name: readable[name] for name in dataset.class_names}
    return Findings(
        num_samples=len(both),
        unreadable={row.id: row.problem for row in both if row.problem is not None},
        duplicates=within,
        across=across,
        conflicting=[[r.id for r in g] for g in groups if len({row.label for row in g}) > 1],
        small_classes={name: size for name, size in sizes.items() if size < minimum},
        imbalance=min(sizes.values()) / max(max(sizes.values()), 1),
        odd_sizes={row.id: odd for row in both if row.size and (odd := _odd(*row.size))},
    )


def _read(dataset: Dataset, is_test: bool, progress: bool) -> Iterator[_Read]:
    def read(position: int) -> _Read:
        name = f"{'test:' if is_test else ''}{dataset.ids[position]}"
        label = dataset.class_names[dataset.labels[position]]
        try:
            image = dataset[position].image
        except OSError as error:
            return _Read(name, is_test, label, name, None, f"cannot be read: {error}")
        content = (
            image if isinstance(image, bytes) else repr(image.shape).encode() + image.tobytes()
        )
        digest = hashlib.sha256(content).hexdigest()
        try:
            size = decode(image, name).size
        except checks.InputError as error:
            return _Read(name, is_test, label, digest, None, str(error))
        return _Read(name, is_test, label, digest, size, None)

    yield from shown(in_order(read, len(dataset)), "read", len(dataset), progress)


def _odd(width: int, height: int) -> str | None:
    small, large = sorted((width, height))
    odd = small < _SMALL_SIDE or large > _LARGE_SIDE or large > _LONG_RATIO * small
    return f"{width} x {height}" if odd else None
