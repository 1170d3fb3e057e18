"""A selection as Parquet in the Hugging Face image convention, alone or as a data set folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from dlc_jax import artefacts
from dlc_jax.exports.images import encoded
from dlc_jax.types import Dataset

_ROWS = 256  # written at a time, so that memory does not grow with the selection
_SCHEMA = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
)


def write_parquet(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes a row per sample: image {bytes, path}, label; class names in the file's metadata."""
    with artefacts.atomic(path) as file:
        _write(samples, file)


def write_hub_folder(samples: Dataset, positions: Int64[np.ndarray, " k"], path: Path) -> None:
    """Writes a folder that `datasets.load_dataset` reads as the split `train`."""
    with artefacts.atomic_folder(path) as root:
        (root / "data").mkdir()
        with open(root / "data" / "train-00000-of-00001.parquet", "wb") as file:
            _write(samples, file)
        (root / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
            f"    path: data/train-*\n---\n\n{len(samples)} samples of {samples.name}.\n"
        )


def _write(samples: Dataset, file: IO) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(samples.class_names), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    with pq.ParquetWriter(file, _SCHEMA.with_metadata(metadata)) as table:
        for batch in _batches(samples):
            table.write_batch(batch)


def _batches(samples: Dataset) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(samples), _ROWS):
        some = [samples[i] for i in range(start, min(start + _ROWS, len(samples)))]
        images = [{"bytes": encoded(sample), "path": sample.id} for sample in some]
        labels = [sample.label for sample in some]
        yield pa.RecordBatch.from_pydict({"image": images, "label": labels}, schema=_SCHEMA)
