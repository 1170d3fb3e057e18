"""`parquet:` in the Hugging Face image convention, and the bundled sample, which is one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dlc_jax import expect
from dlc_jax.datasets import columns
from dlc_jax.datasets.columns import LABELS, USUAL, Columns, column
from dlc_jax.datasets.files import images_in, matching, posix_names
from dlc_jax.datasets.labels import labelled
from dlc_jax.datasets.row_groups import ParquetTable, RecentGroups, Table
from dlc_jax.datasets.splits import joined
from dlc_jax.files.arrow import pa
from dlc_jax.types import Dataset, ImageSource

_IMAGE_COLUMNS = tuple(dict.fromkeys(("image", "img", *columns.PATH_COLUMNS)))
_Images = tuple[ImageSource, list[str | None]]
_DEMOS = {"caltech15/train": "train.parquet", "caltech15/test": "test.parquet"}


def load_demo(where: str, columns: Columns = USUAL) -> Dataset:
    """Loads the bundled sample: 15 Caltech-101 classes, 50 train and 20 test images each."""
    expect.one_of("demo data set", where, _DEMOS)
    file = Path(__file__).parent / "sample" / _DEMOS[where]
    return dataclasses.replace(load_parquet(str(file), columns), name=f"demo:{where}")


def load_parquet(where: str, columns: Columns = USUAL) -> Dataset:
    """Loads one Parquet file, a folder of them or a glob, in sorted order.

    Images are encoded bytes, {bytes, path}, or paths as in `csv:`, relative to the Parquet file's
    folder or absolute. Encoded ones are read by row group when asked for, and 256 MiB of groups are
    kept: larger files are streamed well in order, and slowly when shuffled.

    Raises:
      ValueError: nothing there, not Parquet, no image or label column, a row without image.
    """
    tables = open_parquet(matching("parquet", where))
    return from_tables(f"parquet:{where}", tables, columns)


def open_parquet(files: Iterable[Path]) -> list[ParquetTable]:
    """Returns the files' tables; ValueError names a file that is none."""
    recent = RecentGroups()
    return [ParquetTable.open(file, recent) for file in files]


def from_tables(source: str, tables: Sequence[Table], columns: Columns = USUAL) -> Dataset:
    """Returns the rows of all tables, which must have the same image and label columns.

    Raises:
      ValueError: no image or label column or several, columns or class names that differ, a row
        without image.
    """
    names, features = tables[0].schema.names, _declared_features(tables[0].schema)

    def declared(kind: str) -> list[str]:
        return [name for name, feature in features.items() if feature.get("_type") == kind]

    image = column(
        source, "image", names, _IMAGE_COLUMNS, columns.image, declared=declared("Image")
    )
    label = column(source, "label", names, LABELS, columns.label, declared=declared("ClassLabel"))
    class_names = _class_names(tables[0], label)
    values: list = []
    all_paths: list[str | None] = []
    parts = []
    for table in tables:
        for name in (image, label):
            if table.schema.names.count(name) != 1:
                raise expect.InputError(
                    f"{source}: its files differ in columns: {table.file} has "
                    f"{expect.listed(table.schema.names)}, expected one {name!r}."
                )
        others = _class_names(table, label)
        if others != class_names:
            raise expect.InputError(
                f"{source}: its files differ in class names: {table.file} declares "
                f"{expect.listed(map(repr, others or ())) or 'none'}, {tables[0].file} "
                f"{expect.listed(map(repr, class_names or ())) or 'none'}."
            )
        values += table.values(label)
        images, paths = _images(table, image)
        parts.append(images)
        all_paths += paths
    return labelled(joined(parts), values, all_paths, source, class_names)


def _declared_features(schema: pa.Schema) -> dict[str, dict]:
    """Returns the features that the `datasets` library wrote into the schema, if any."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"].items()
        # nested features, as for boxes, are lists and are neither image nor label
        return {name: feature for name, feature in features if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # written by something else: the usual column names have to do


def _class_names(table: Table, label: str) -> list[str] | None:
    names = _declared_features(table.schema).get(label, {}).get("names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise expect.InputError(
            f"{table.file}: expected the names of classes to be a list of texts, found "
            f"{expect.listed(names) if isinstance(names, list) else repr(names)}."
        )
    return names


def _images(table: Table, name: str) -> _Images:
    """Returns a table's images, and each one's path where there is one."""
    kind = table.schema.field(name).type
    if _is_text(kind):
        return _files(table, name, table.values(name))
    where: tuple[str, ...] = (name,)
    path_column = None
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" not in fields:
            raise expect.InputError(
                f"{table.file}: image column has fields {expect.listed(sorted(fields))}, "
                "expected bytes and path."
            )
        where, kind = (name, "bytes"), fields["bytes"]
        path_column = "path" if _is_text(fields.get("path", pa.null())) else None
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null()):
        raise expect.InputError(
            f"{table.file}: images are {kind}, expected encoded bytes, {{bytes, path}} or paths."
        )
    missing, images = table.missing(*where), table.images(*where)
    paths = table.values(name, path_column) if path_column else [None] * len(images)
    if len(missing) == len(paths) and any(paths):
        return _files(table, name, paths)
    if len(missing):
        raise expect.InputError(
            f"{table.file}: {len(missing)} rows have no image bytes, first row {missing[0]} "
            f"(path {paths[missing[0]]!r})."
        )
    return images, paths


def _files(table: Table, name: str, paths: Sequence[str | None]) -> _Images:
    bad = next((row for row, path in enumerate(paths) if not path or "\0" in path), None)
    if bad is not None:
        raise expect.InputError(
            f"{table.file}: column {name}, row {bad}: expected a path, found {paths[bad]!r}."
        )
    root = table.file.parent
    names = posix_names(root, map(str, paths))
    return images_in(root, names), [*names]


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())
