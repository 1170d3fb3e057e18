"""`tfds:` prepared TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Sequence
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.files import LazyImages
from dlc_jax.datasets.labels import Columns, labelled
from dlc_jax.types import Dataset

# tfds's own errors differ by kind, and so do those of networks and disks
_refusing = functools.partial(expect.refusing, shown=expect.first_line, end="")
_NAME_FEATURES = ("file_name", "filename", "image/filename", "image_id", "id")


def load_tfds(where: str, columns: Columns) -> Dataset:
    """Loads `<name>/<split>`, with tfds's own split syntax (`dtd/train+validation`).

    Raises:
      ValueError: an unknown name or split, no image or label feature or several, or data that are
        not prepared and cannot be (preparing needs the `tfds` extra and network).
    """
    import tensorflow_datasets as tfds  # heavy, and only this source needs it

    name, _, split = where.rpartition("/")
    if not name or not split:
        raise expect.InputError(f"tfds:{where}: expected tfds:<name>/<split>.")
    with _refusing(f"tfds:{where}: no data set {name!r}", Exception):
        builder = tfds.builder(name)
    if not builder.is_prepared():
        _prepare(builder, where)
    features = builder.info.features

    def feature(kind: type, what: str, *usual: Sequence[str]) -> str:
        declared = [name for name, feature in features.items() if isinstance(feature, kind)]
        names = list(features)
        return columns.find(f"tfds:{where}", what, names, *usual, declared=declared, noun="feature")

    image = feature(tfds.features.Image, "image", ("image",))
    label = feature(tfds.features.ClassLabel, "label")
    if not isinstance(features[image], tfds.features.Image):
        raise expect.InputError(
            f"tfds:{where}: feature {image!r} is {type(features[image]).__name__}, expected Image."
        )
    with _refusing(
        f"tfds:{where}: cannot read split {split!r} "
        f"(the data set has {expect.listed(builder.info.splits)}; files must be array_record)",
        Exception,
    ):
        source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    images = LazyImages(source, operator.itemgetter(image))
    name_feature = next((f for f in _NAME_FEATURES if f in features), None)
    values, names = [], []
    for position in range(len(source)):
        record = source[position]
        values.append(_value(record[label]))
        names.append(str(_value(record[name_feature])) if name_feature else None)
    class_names = getattr(features[label], "names", None)
    return labelled(images, values, names, f"tfds:{where}", class_names)


def _prepare(builder: Any, where: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise expect.InputError(
            f"tfds:{where}: not prepared in {builder.data_dir}, and preparing needs TensorFlow: "
            "install the extra with pip install -e '.[tfds]', or prepare it elsewhere as "
            "array_record (tfds build --file_format=array_record) and point TFDS_DATA_DIR there."
        )
    problem = f"tfds:{where}: could not be downloaded and prepared in {builder.data_dir}"
    with _refusing(problem, Exception, shown=lambda error: f"{type(error).__name__}: {error}"):
        builder.download_and_prepare(file_format="array_record")


def _value(value: Any) -> Any:
    """Returns bytes as text, and integers as they are."""
    return value.decode() if isinstance(value, bytes) else value
