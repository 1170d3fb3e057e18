"""`csv:` a table of image paths and labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.columns import LABELS, USUAL, Columns, column
from dlc_jax.datasets.files import Files, posix_names, regular
from dlc_jax.datasets.labels import encode_labels, integers_or_text, stable_ids
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
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise checks.InputError(f"{source}: cannot be read as UTF-8 text: {error}.") from error
    try:
        lines = io.StringIO(text, newline="")  # splitlines would part rows at U+2028, too
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise checks.InputError(f"{source}: not a table of values: {error}.") from error
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise checks.InputError(f"{source}: expected a header and one or more rows, found fewer.")
    header = [name.strip() for name in rows[0]]
    path_name = column(source, "path", header, PATH_COLUMNS, columns.image)
    label_name = column(source, "label", header, LABELS, columns.label)
    path_column, label_column = header.index(path_name), header.index(label_name)
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
    encoded = encode_labels(integers_or_text(values), None, source)
    names = posix_names(file.parent, names)
    images = Files(file.parent, np.asarray(names, np.str_))
    ids = stable_ids(names, images)
    return Dataset(images, encoded.ids, ids, encoded.class_names, source, encoded.table)
