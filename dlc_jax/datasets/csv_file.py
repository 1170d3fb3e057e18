"""`csv:` a table of image paths and labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dlc_jax import checks
from dlc_jax.datasets.columns import LABELS, USUAL, Columns, column
from dlc_jax.datasets.files import images_in, posix_names, regular
from dlc_jax.datasets.labels import integers_or_text, labelled
from dlc_jax.types import Dataset

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
    with checks.refusing(f"{source}: cannot be read as UTF-8 text", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    with checks.refusing(f"{source}: not a table of values", csv.Error):
        lines = io.StringIO(text, newline="")  # splitlines would part rows at U+2028, too
        rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    if len(rows) < 2:
        raise checks.InputError(f"{source}: expected a header and one or more rows, found fewer.")
    header = [name.strip() for name in rows[0]]
    path_column = header.index(column(source, "path", header, PATH_COLUMNS, columns.image))
    label_column = header.index(column(source, "label", header, LABELS, columns.label))
    names, values = [], []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise checks.InputError(
                f"{source}: row {number} has {len(row)} values, expected {len(header)}."
            )
        name, label = row[path_column].strip(), row[label_column].strip()
        if not name or not label or "\0" in name:
            raise checks.InputError(f"{source}: row {number} has no path or no label: {row}.")
        names.append(name)
        values.append(label)
    names = posix_names(file.parent, names)
    return labelled(images_in(file.parent, names), integers_or_text(values), names, source)
