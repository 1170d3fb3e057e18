"""Which column of a table, array, feature or key holds images or labels, and `csv:`."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from dlc_jax import expect
from dlc_jax.datasets.files import images_in, posix_names, regular
from dlc_jax.datasets.labels import integers_or_text, labelled
from dlc_jax.types import Dataset

LABELS = ("label", "labels", "fine_label", "class", "class_name", "category", "target")  # usual
_NO_LABELS = ("split", "subset", "partition", "fold")  # declared like labels, as by `datasets`


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names asked for; None: the usual ones."""

    image: str | None = None
    label: str | None = None


USUAL = Columns()


def column(
    where: str,
    what: str,
    names: Sequence[str],
    usual: Sequence[str],
    wanted: str | None = None,
    *,
    declared: Iterable[str] = (),
    noun: str = "column",
) -> str:
    """Returns the name of the column of images or labels; capitals do not matter.

    In this order: the one asked for; the first usual name; one with a usual name that is declared
    to be of the type; the only one that is declared or has a usual name. Where some columns are
    declared to hold images, no others are considered for them.

    Args:
      where: For messages.
      what: `image`, `path` (of an image) or `label`.
      names: Names of all columns.
      usual: Usual names in lower case, the one that wins over all others first.
      wanted: The name asked for, if any.
      declared: Names of columns that are declared to hold images or class labels.
      noun: What messages call a column.
    Raises:
      ValueError: no such column, or several that may be meant.
    """
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
                f"{where}: more than one {noun} may hold the {what}: {expect.listed(candidates)}; "
                f"set {setting} to one of them ({found})."
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


PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")


def load_csv(where: str, columns: Columns = USUAL) -> Dataset:
    """Loads `<file>.csv`, or `.tsv` with tabs, with a header line, capitals in which do not matter.

    Paths are relative to the table's folder, or absolute; they may have backslashes. Labels that
    are all integers (of at most 18 digits, written plainly) are class ids; others are names.

    Raises:
      ValueError: no such file, not UTF-8 text, no path or label column or several, a row
        without either.
    """
    source, file = f"csv:{where}", Path(where).expanduser()
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with expect.refusing(f"{source}: cannot be read as UTF-8 text", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    with expect.refusing(f"{source}: not a table of values", csv.Error):
        lines = io.StringIO(text, newline="")  # splitlines would part rows at U+2028, too
        rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    if len(rows) < 2:
        raise expect.InputError(f"{source}: expected a header and one or more rows, found fewer.")
    header = [name.strip() for name in rows[0]]
    path_column = header.index(column(source, "path", header, PATH_COLUMNS, columns.image))
    label_column = header.index(column(source, "label", header, LABELS, columns.label))
    names, values = [], []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise expect.InputError(
                f"{source}: row {number} has {len(row)} values, expected {len(header)}."
            )
        name, label = row[path_column].strip(), row[label_column].strip()
        if not name or not label or "\0" in name:
            raise expect.InputError(f"{source}: row {number} has no path or no label: {row}.")
        names.append(name)
        values.append(label)
    names = posix_names(file.parent, names)
    return labelled(images_in(file.parent, names), integers_or_text(values), names, source)
