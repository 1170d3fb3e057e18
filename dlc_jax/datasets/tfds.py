"""`tfds:` prepared TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.columns import LABELS, USUAL, Columns, column
from dlc_jax.datasets.labels import encode_labels, stable_ids
from dlc_jax.types import Dataset

_NAME_FEATURES = ("file_name", "filename", "image/filename", "image_id", "id")


@dataclasses.dataclass(frozen=True)
class _Records:
    source: Any  # a tfds data source: random access to dictionaries
    image: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> bytes:
        return self.source[position][self.image]


def load_tfds(where: str, columns: Columns = USUAL) -> Dataset:
    """Loads `<name>/<split>`, with tfds's own split syntax (`dtd/train+validation`).

    Raises:
      ValueError: an unknown name or split, no image or label feature or several, or data that are
        not prepared and cannot be (preparing needs the `tfds` extra and network).
    """
    import tensorflow_datasets as tfds  # heavy, and only this source needs it

    name, _, split = where.rpartition("/")
    if not name or not split:
        raise checks.InputError(f"tfds:{where}: expected tfds:<name>/<split>.")
    try:
        builder = tfds.builder(name)
    except Exception as error:  # tfds's own errors for names differ by kind
        raise checks.InputError(
            f"tfds:{where}: no data set {name!r}: {checks.first_line(error)}"
        ) from error
    if not builder.is_prepared():
        _prepare(builder, where)
    features = builder.info.features
    image = _feature(features, where, tfds.features.Image, "image", columns.image)
    label = _feature(features, where, tfds.features.ClassLabel, "label", columns.label)
    if not isinstance(features[image], tfds.features.Image):
        raise checks.InputError(
            f"tfds:{where}: feature {image!r} is {type(features[image]).__name__}, expected Image."
        )
    try:
        source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except Exception as error:  # an unknown split, or files that are not array_record
        raise checks.InputError(
            f"tfds:{where}: cannot read split {split!r} "
            f"(the data set has {checks.listed(builder.info.splits)}; files must be array_record): "
            f"{checks.first_line(error)}"
        ) from error
    records = _Records(source, image)
    name_feature = next((f for f in _NAME_FEATURES if f in features), None)
    values, names = [], []
    for position in range(len(source)):
        record = source[position]
        values.append(_value(record[label]))
        names.append(_text(record[name_feature]) if name_feature else None)
    labels = encode_labels(values, getattr(features[label], "names", None), f"tfds:{where}")
    ids = stable_ids(names, records)
    return Dataset(records, labels.ids, ids, labels.class_names, f"tfds:{where}", labels.table)


def _prepare(builder: Any, where: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise checks.InputError(
            f"tfds:{where}: not prepared in {builder.data_dir}, and preparing needs TensorFlow: "
            "install the extra with pip install -e '.[tfds]', or prepare it elsewhere as "
            "array_record (tfds build --file_format=array_record) and point TFDS_DATA_DIR there."
        )
    import tensorflow_datasets as tfds

    try:
        config = tfds.download.DownloadConfig()
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # network, checksums, disk: all end the same way for the user
        raise checks.InputError(
            f"tfds:{where}: could not be downloaded and prepared in {builder.data_dir}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _feature(features: Any, where: str, kind: type, what: str, wanted: str | None) -> str:
    declared = [name for name, feature in features.items() if isinstance(feature, kind)]
    usual = LABELS if what == "label" else ("image",)
    return column(
        f"tfds:{where}", what, list(features), usual, wanted, declared=declared, noun="feature"
    )


def _value(label: Any) -> Any:
    """Returns an integer or text as Python's."""
    if isinstance(label, np.integer):
        return int(label)
    return label.decode() if isinstance(label, bytes) else label


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
