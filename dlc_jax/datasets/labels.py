"""Which column, array, feature or key holds images or labels; class ids 0..c-1, and stable ids."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.types import Dataset, ImageSource

# Usual names of columns.
LABELS = ("label", "labels", "fine_label", "class", "class_name", "category", "target")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")
_NO_LABELS = ("split", "subset", "partition", "fold")  # declared like labels, as by `datasets`
Labels = tuple[np.ndarray, tuple[str, ...], dict[int, int] | None]


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names asked for; None: the usual ones."""

    image: str | None = None
    label: str | None = None

    def find(
        self,
        where: str,
        what: str,
        names: Sequence[str],
        usual: Sequence[str] = LABELS,
        *,
        declared: Iterable[str] = (),
        noun: str = "column",
    ) -> str:
        """Returns the name of the column of images or labels; capitals do not matter.

        In this order: the one asked for; the first usual name; one with a usual name that is
        declared to be of the type; the only one that is declared or has a usual name. Where some
        columns are declared to hold images, no others are considered for them.

        Args:
          where: For messages.
          what: `image`, `path` (of an image) or `label`.
          names: Names of all columns.
          usual: Usual names in lower case, the one that wins over all others first.
          declared: Names of columns that are declared to hold images or class labels.
          noun: What messages call a column.
        Raises:
          ValueError: no such column, or several that may be meant.
        """
        wanted = self.label if what == "label" else self.image
        found = f"found {expect.listed(names) or 'none'}"
        setting = f"dataset.{'label' if what == 'label' else 'image'}_column"
        typed = [name for name in declared if name in names]
        if what == "label":
            typed = [name for name in typed if name.lower() not in _NO_LABELS]
        pool = typed if what == "image" and typed else names
        choices = [
            _named(pool, usual[:1]),
            [name for name in pool if name in typed and name.lower() in usual],
            [name for name in pool if name in typed or name.lower() in usual],
        ]
        if wanted is not None:
            choices = [_named(names, [wanted])]
        for candidates in choices:
            if len(candidates) > 1:
                raise expect.InputError(
                    f"{where}: more than one {noun} may hold the {what}: "
                    f"{expect.listed(candidates)}; set {setting} to one of them ({found})."
                )
            if candidates:
                return candidates[0]
        if wanted is not None:
            raise expect.InputError(f"{where}: no {noun} {wanted!r} ({setting}); {found}.")
        raise expect.InputError(
            f"{where}: no {what} {noun}; expected one named {' or '.join(usual)}, {found}. "
            f"Another name is set by {setting}."
        )


def _named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Returns the names that are wanted as they are; if none is, whatever their capitals."""
    same = [name for name in names if name in wanted]
    return same or [name for name in names if name.lower() in map(str.lower, wanted)]


def encode_labels(values: Sequence, class_names: Sequence[str] | None, where: str) -> Labels:
    """Turns string or integer labels into class ids.

    Strings become their places among the class names, or among their own sorted names. Integers
    stay where the source names its classes; without names, integers that are not 0..c-1 are
    remapped in ascending order.

    Returns:
      Class ids [n] int32, a name per class, and original -> class id where they were remapped.
    Raises:
      ValueError: a missing label, another type, an integer without a class name or beyond 64 bits,
        or class names that are not all different.
    """
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise expect.InputError(
            f"{where}: {len(missing)} samples have no label, first at row {missing[0]}."
        )
    if class_names is not None:
        class_names = [composed(name) for name in class_names]
        repeated = [name for name, count in Counter(class_names).items() if count > 1]
        if repeated:
            raise expect.InputError(
                f"{where}: class names must be all different; {expect.listed(map(repr, repeated))} "
                f"occur more than once among {expect.listed(map(repr, class_names))}."
            )
    if all(isinstance(value, str) for value in values):
        values = [composed(value) for value in values]
        names = tuple(class_names or sorted(set(values)))
        unnamed = sorted(set(values) - set(names))
        if unnamed:
            raise expect.InputError(
                f"{where}: labels {expect.listed(map(repr, unnamed))} are not among the "
                f"{len(names)} class names."
            )
        rank = {name: index for index, name in enumerate(names)}
        return np.array([rank[value] for value in values], np.int32), names, None
    for row, value in enumerate(values):
        if not isinstance(value, numbers.Integral):
            raise expect.InputError(
                f"{where}: labels must be integers or strings, all alike; found "
                f"{reprlib.repr(value)} in row {row}."
            )
        if not -(2**63) <= int(value) < 2**63:
            raise expect.InputError(
                f"{where}: row {row} has label {value}, expected an integer of 64 bits."
            )
    array = np.asarray(values, np.int64)
    if class_names is not None:
        bad = np.flatnonzero((array < 0) | (array >= len(class_names)))
        if bad.size:
            raise expect.InputError(
                f"{where}: row {bad[0]} has label {array[bad[0]]}, but the source names "
                f"{len(class_names)} classes (0..{len(class_names) - 1})."
            )
        return array.astype(np.int32), tuple(class_names), None
    found, ids = np.unique(array, return_inverse=True)
    is_plain = np.array_equal(found, np.arange(len(found)))
    table = None if is_plain else {value: index for index, value in enumerate(found.tolist())}
    return ids.astype(np.int32), tuple(map(str, found)), table


def composed(name: str) -> str:
    """Returns a class name in Unicode's composed form (NFC), in which equal names are equal."""
    return unicodedata.normalize("NFC", name)


def integers_or_text(values: Sequence) -> list:
    """Returns text that is integers throughout as integers, and everything else as it is.

    Only the plain way to write an integer counts: 01 and 1 are two names.
    """
    text = [value for value in values if isinstance(value, str)]
    if not all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) for value in text):
        return list(values)
    return [int(value) if isinstance(value, str) else value for value in values]


def stable_ids(names: Sequence[str | None] | np.ndarray, images: ImageSource) -> np.ndarray:
    """Returns the names where all are present and unique, else hashes of the images' content.

    An array of paths is unique, and is not copied: of millions it takes gigabytes.

    A running number behind the hash tells images of equal content apart. Of an image that cannot
    be read, the name is hashed; the decoder reports it later.
    """
    if isinstance(names, np.ndarray):
        return names
    if all(names) and len(set(names)) == len(names):
        return np.array(names, dtype=object)  # as text, NumPy would drop a NUL at the end

    def content(position: int) -> bytes:
        try:
            image = images[position]
        except OSError:
            return f"unreadable {names[position]}".encode(errors="surrogatepass")
        return image.tobytes() if isinstance(image, np.ndarray) else image

    return np.asarray(content_ids(map(content, range(len(images)))), np.str_)


def content_ids(contents: Iterable[bytes]) -> list[str]:
    """Returns a hash of each content, with a running number behind repeated ones."""
    ids, seen = [], Counter[str]()
    for content in contents:
        digest = hashlib.sha256(content).hexdigest()[:16]
        ids.append(f"{digest}-{seen[digest]}" if seen[digest] else digest)
        seen[digest] += 1
    return ids


def labelled(
    images: ImageSource,
    values: Sequence,
    names: Sequence[str | None] | np.ndarray,
    source: str,
    class_names: Sequence[str] | None = None,
    **more: Any,
) -> Dataset:
    """Returns the data set of images that a source gives with labels and names.

    Args:
      images: n images.
      values: [n] labels, strings or integers, see `encode_labels`.
      names: [n] what may be the ids, see `stable_ids`.
      source: Name of the data set.
      class_names: Those that the source declares, if it does.
      more: Other attributes of the data set.
    Raises:
      ValueError: see `encode_labels`.
    """
    labels, classes, table = encode_labels(values, class_names, source)
    ids = stable_ids(names, images)
    return Dataset(images, labels, ids, classes, source, table, **more)
