"""What is wrong with a data set: unreadable, deep and repeated images, small classes, odd sizes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.files import left_out_text
from dlc_jax.files.image_files import depth
from dlc_jax.preprocess.decode import decode, in_order
from dlc_jax.preprocess.images import is_mid_grey, shown
from dlc_jax.types import Dataset

# Smallest over largest class, and sides in pixels, beyond which a person should look.
_IMBALANCE = 0.1
_SMALL_SIDE, _LARGE_SIDE, _LONG_RATIO = 32, 8192, 5.0


@dataclasses.dataclass(frozen=True)
class Findings:
    """What `inspect` found; ids are those of the data set, test ids begin with `test:`.

    Attributes:
      num_samples: Read, or tried to, without the test set's.
      num_test_samples: Those; None without a test set.
      unreadable: Id -> why.
      deep: Id -> what it has, of more than 8 bits a channel, where `deep_images` is `error`.
      mid_grey: Ids of the constant images that `deep_images="min_max"` makes mid-grey.
      duplicates: Groups of ids within the data set (or within the test set) of the same content.
      across: Groups of ids of the same content in both, training first.
      conflicting: Groups of duplicates with different labels.
      small_classes: Class name -> readable images, where fewer than the minimum.
      imbalance: Readable images of the smallest class over those of the largest.
      odd_sizes: Id -> size, where a side is under 32 or over 8192 pixels or five times the other.
      left_out: Suffix -> files beside the samples that nobody reads.
      test_left_out: The same of the test set.
      empty_classes: Names that the data set declares and has no sample of.
      test_empty_classes: The same of the test set.
      of_test: What was looked for -> how many of the cases are the test set's alone.
    """

    num_samples: int
    num_test_samples: int | None
    unreadable: dict[str, str]
    deep: dict[str, str]
    mid_grey: list[str]
    duplicates: list[list[str]]
    across: list[list[str]]
    conflicting: list[list[str]]
    small_classes: dict[str, int]
    imbalance: float
    odd_sizes: dict[str, str]
    left_out: dict[str, int]
    test_left_out: dict[str, int]
    empty_classes: list[str]
    test_empty_classes: list[str]
    of_test: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to look at."""
        return all(num == 0 for name, num, _ in self.rows() if not name.startswith("samples"))

    def rows(self) -> list[tuple[str, int, str]]:
        """Returns what was looked for, how often it was found, and the first case.

        Cases of the test set have rows of their own.
        """
        rows = [("samples", self.num_samples, "")]
        if self.num_test_samples is not None:
            rows.append(("samples of the test set", self.num_test_samples, ""))
        for name, found in self._lists():
            cases = _cases(found)
            num_test = self.of_test.get(name, 0)
            num = len(cases) - num_test
            rows.append((name, num, expect.shortened(cases[0], 100) if num else ""))
            if num_test:
                rows.append((f"{name}, test set", num_test, expect.shortened(cases[num], 100)))
        for name, files in (("", self.left_out), (", test set", self.test_left_out)):
            if files or not name:
                rows.append((f"files left out{name}", sum(files.values()), left_out_text(files)))
        uneven = self.imbalance < _IMBALANCE
        said = f"smallest class over largest: {self.imbalance:.3f}" if uneven else ""
        return [*rows, ("label imbalance", int(uneven), said)]

    def to_name(self) -> dict[str, list[str]]:
        """Returns all cases, a line each, of what has to be dealt with image by image."""
        wanted = ("unreadable", "more than 8 bits a channel", "constant, made mid-grey")
        return {name: _cases(found) for name, found in self._lists() if name in wanted and found}

    def _lists(self) -> tuple[tuple[str, list | dict], ...]:
        """Returns what was looked for and all cases of it, those of the test set last."""
        return (
            ("unreadable", self.unreadable),
            ("more than 8 bits a channel", self.deep),
            ("constant, made mid-grey", self.mid_grey),
            ("repeated content (groups)", self.duplicates),
            ("repeated under other labels", self.conflicting),
            ("in training and test (groups)", self.across),
            ("classes without samples", [*self.empty_classes, *self.test_empty_classes]),
            ("classes under the minimum", self.small_classes),
            ("odd sizes", self.odd_sizes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, for JSON."""
        return dataclasses.asdict(self)


def _cases(found: list | dict) -> list[str]:
    """Returns one line per case."""
    if isinstance(found, dict):
        return [f"{key} {value}" for key, value in found.items()]
    return [case if isinstance(case, str) else " = ".join(case) for case in found]


class _Read(NamedTuple):
    """What is kept of an image."""

    id: str
    is_test: bool
    label: str
    digest: str
    problem: str | None
    deep: str | None = None
    odd: str | None = None
    is_mid_grey: bool = False


def inspect(
    dataset: Dataset, test: Dataset | None = None, *, minimum: int = 5, progress: bool = False
) -> Findings:
    """Reads and decodes every image once.

    Args:
      dataset: What to look at.
      test: What must not have images in common with it.
      minimum: Classes with fewer readable images are reported.
      progress: Whether to show a bar on the terminal.
    Raises:
      ValueError: a minimum below 1.
    """
    expect.at_least("minimum", minimum, 1)
    train = list(_read(dataset, False, progress))
    both = train + (list(_read(test, True, progress)) if test is not None else [])
    by_content = defaultdict(list)
    for row in both:
        by_content[row.digest].append(row)
    groups = [group for group in by_content.values() if len(group) > 1]

    def repeated(is_test: bool) -> list[list[str]]:
        """Returns the ids of each group within the data set, or within the test set."""
        sides = ([row.id for row in group if row.is_test == is_test] for group in groups)
        return [side for side in sides if len(side) > 1]

    readable = Counter(row.label for row in train if row.problem is None)
    sizes = {name: readable[name] for name in dataset.class_names}
    no_class = [] if test is None else list(test.empty_classes)
    return Findings(
        num_samples=len(train),
        num_test_samples=None if test is None else len(test),
        unreadable={row.id: row.problem for row in both if row.problem is not None},
        deep={row.id: row.deep for row in both if row.deep is not None},
        mid_grey=[row.id for row in both if row.is_mid_grey],
        duplicates=[*repeated(False), *repeated(True)],
        across=[[r.id for r in g] for g in groups if len({row.is_test for row in g}) > 1],
        conflicting=[[r.id for r in g] for g in groups if len({row.label for row in g}) > 1],
        small_classes={name: size for name, size in sizes.items() if size < minimum},
        imbalance=min(sizes.values()) / max(max(sizes.values()), 1),
        odd_sizes={row.id: row.odd for row in both if row.odd is not None},
        left_out=dict(dataset.left_out),
        test_left_out={} if test is None else dict(test.left_out),
        empty_classes=list(dataset.empty_classes),
        test_empty_classes=no_class,
        of_test={
            "unreadable": sum(row.is_test and row.problem is not None for row in both),
            "more than 8 bits a channel": sum(row.is_test and row.deep is not None for row in both),
            "constant, made mid-grey": sum(row.is_test and row.is_mid_grey for row in both),
            "repeated content (groups)": len(repeated(True)),
            "classes without samples": len(no_class),
            "odd sizes": sum(row.is_test and row.odd is not None for row in both),
        },
    )


def _read(dataset: Dataset, is_test: bool, progress: bool) -> Iterator[_Read]:
    def read(position: int) -> _Read:
        """Takes deep images as Pillow does where they are only listed."""
        name = f"{'test:' if is_test else ''}{dataset.ids[position]}"
        label = dataset.class_names[dataset.labels[position]]
        try:
            image = dataset[position].image
        except OSError as error:
            return _Read(name, is_test, label, name, f"cannot be read: {error}")
        data = image if isinstance(image, bytes) else repr(image.shape).encode() + image.tobytes()
        digest = hashlib.sha256(data).hexdigest()
        how = dataset.deep_images
        deep = depth(image) if how == "error" else None
        try:
            decoded = decode(image, name, "clip" if how == "error" else how)
        except expect.InputError as error:
            return _Read(name, is_test, label, digest, str(error), deep)
        small, large = sorted(decoded.size)
        is_odd = small < _SMALL_SIDE or large > _LARGE_SIDE or large > _LONG_RATIO * small
        odd = f"{decoded.width} x {decoded.height}" if is_odd else None
        grey = is_mid_grey(dataset, np.asarray(decoded))
        return _Read(name, is_test, label, digest, None, deep, odd, grey)

    yield from shown(in_order(read, len(dataset)), "read", len(dataset), progress)
