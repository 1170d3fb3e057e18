"""`parquet:` in the Hugging Face image convention, and the bundled sample, which is one."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dlc_jax import checks
from dlc_jax.datasets.files import matching
from dlc_jax.datasets.labels import encode_labels, stable_ids
from dlc_jax.types import Dataset

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_DEMOS = ("caltech15/train", "caltech15/test")


@dataclasses.dataclass(frozen=True)
class _EncodedColumn:
    column: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, position: int) -> bytes:
        return self.column[position].as_py()


def load_demo(where: str) -> Dataset:
    """Loads the bundled sample: 15 Caltech-101 classes, 50 train and 20 test images each."""
    checks.one_of("demo data set", where, _DEMOS)
    split = where.rpartition("/")[2]
    file = resources.files("dlc_jax.datasets") / "sample" / f"{split}.parquet"
    return dataclasses.replace(load_parquet(str(file)), name=f"demo:{where}")


def load_parquet(where: str) -> Dataset:
    """Loads one Parquet file, a folder of them or a glob, in sorted order.

    Raises:
      ValueError: nothing there, not Parquet, no image or label column, a row without image.
    """
    return from_tables(
        f"parquet:{where}", [read_parquet(file) for file in matching("parquet", where, ".parquet")]
    )


def read_parquet(file: Path) -> pa.Table:
    """Returns the table, mapped where possible; ValueError names a file that is none."""
    try:
        return pq.read_table(file, memory_map=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise checks.InputError(f"{file}: not a readable Parquet file: {error}.") from error


def from_tables(source: str, tables: list[pa.Table]) -> Dataset:
    """Returns the rows of all tables, which must have the same image and label columns.

    Raises:
      ValueError: no image or label column, columns that differ, a row without image.
    """
    features = _declared_features(tables[0].schema)
    image_column = _column(source, tables[0], "image", _IMAGE_COLUMNS, features, "Image")
    label_column = _column(source, tables[0], "label", _LABEL_COLUMNS, features, "ClassLabel")
    try:
        table = pa.concat_tables([t.select([image_column, label_column]) for t in tables])
    except (pa.ArrowException, KeyError) as error:
        raise checks.InputError(f"{source}: its files differ in columns: {error}.") from error
    encoded, paths = _encoded_images(source, table[image_column])
    labels = encode_labels(
        table[label_column].to_pylist(), features.get(label_column, {}).get("names"), source
    )
    ids = stable_ids(paths, encoded)
    return Dataset(encoded, labels.ids, ids, labels.class_names, source, labels.table)


def _declared_features(schema: pa.Schema) -> dict[str, dict]:
    """Returns the features that the `datasets` library wrote into the schema, if any."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}  # written by something else: the usual column names have to do
    # nested features, as for boxes, are lists and are neither image nor label
    return {n: f for n, f in (features or {}).items() if isinstance(f, dict)}


def _column(
    source: str,
    table: pa.Table,
    what: str,
    usual: tuple[str, ...],
    features: dict[str, dict],
    feature_type: str,
) -> str:
    declared = [n for n, feature in features.items() if feature.get("_type") == feature_type]
    for name in (*declared, *usual):
        if name in table.column_names:
            return name
    raise checks.InputError(
        f"{source}: no {what} column; expected one named {' or '.join(usual)}, "
        f"found {', '.join(table.column_names)}."
    )


def _encoded_images(
    source: str, column: pa.ChunkedArray
) -> tuple[_EncodedColumn, list[str | None]]:
    """Returns the column of encoded bytes, and each image's path where the column has one."""
    paths: list[str | None] = [None] * len(column)
    if pa.types.is_struct(column.type):
        fields = {column.type.field(i).name for i in range(column.type.num_fields)}
        if "bytes" not in fields:
            raise checks.InputError(
                f"{source}: image column has fields {sorted(fields)}, expected bytes and path."
            )
        if "path" in fields:
            paths = _struct_field(column, "path").to_pylist()
        column = _struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise checks.InputError(
            f"{source}: images are {column.type}, expected encoded bytes or {{bytes, path}}."
        )
    if column.null_count:
        row = next(i for i, value in enumerate(column.is_null().to_pylist()) if value)
        raise checks.InputError(
            f"{source}: {column.null_count} rows have no image bytes, first row {row} "
            f"(path {paths[row]!r})."
        )
    return _EncodedColumn(column), paths


def _struct_field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    field = column.type.field(name)
    return pa.chunked_array([chunk.field(name) for chunk in column.chunks], type=field.type)
