"""A selection as Parquet in the Hugging Face image convention, alone or as a data set folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from dlc_jax.checks.escaping import markdown_text
from dlc_jax.exports.images import encoded, read
from dlc_jax.exports.part import Part
from dlc_jax.files.arrow import pa, pq
from dlc_jax.types import Dataset
from dlc_jax.workspace import artefacts

# Written at a time, so that memory does not grow with the selection.
_ROWS, _BYTES = 256, 2**26

Item = TypeVar("Item")


def write_parquet(part: Part, path: Path) -> None:
    """Writes a row per sample: image {bytes, path}, label; class names in the file's metadata."""
    with artefacts.atomic(path) as file:
        _write(part.samples, file)


def write_hub_folder(part: Part, path: Path) -> None:
    """Writes a folder that `datasets.load_dataset` reads as the split `train`."""
    with artefacts.atomic_folder(path) as root:
        (root / "data").mkdir()
        with open(root / "data" / "train-00000-of-00001.parquet", "wb") as file:
            _write(part.samples, file)
        (root / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
            f"    path: data/train-*\n---\n\n{len(part.samples)} samples of "
            f"{markdown_text(part.samples.name)}.\n"
        )


def _write(samples: Dataset, file: IO) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(samples.class_names), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "label": pa.int64()}, metadata)
    with pq.ParquetWriter(file, schema) as table:
        for rows in grouped(
            _table_rows(samples), lambda row: len(row["image"]["bytes"]), _BYTES, _ROWS
        ):
            table.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def _table_rows(samples: Dataset) -> Iterator[dict[str, Any]]:
    for index in range(len(samples)):
        sample = read(samples, index)
        yield {"image": {"bytes": encoded(sample), "path": sample.id}, "label": sample.label}


def grouped(
    items: Iterable[Item], num_bytes: Callable[[Item], int], most_bytes: int, most_items: float
) -> Iterator[list[Item]]:
    """Yields the items in order, as many at a time as these limits allow, at least one."""
    group: list[Item] = []
    total = 0
    for item in items:
        total += num_bytes(item)
        if group and (total > most_bytes or len(group) == most_items):
            yield group
            group, total = [], num_bytes(item)
        group.append(item)
    if group:
        yield group
