"""Arrays and lists already in memory as a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlc_jax import checks
from dlc_jax.datasets.labels import encode_labels, stable_ids
from dlc_jax.types import Dataset


def array_dataset(
    images: Sequence[bytes | np.ndarray] | np.ndarray,
    labels: Sequence | np.ndarray,
    ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    *,
    deep_images: str = Dataset.deep_images,
) -> Dataset:
    """Wraps images in memory.

    Args:
      images: Encoded bytes, or uint8 arrays [h, w, 3], [h, w, 1] or [h, w]; one array [n, ...] too.
        Of other numbers `deep_images` decides.
      labels: [n] strings or integers.
      ids: [n] unique names; None takes a hash of the content.
      class_names: Name of label 0, 1, ...; None takes the labels themselves.
      name: For messages.
      deep_images: How more than 8 bits a channel become 8, see `Dataset`.
    Raises:
      ValueError: lengths that differ, duplicate ids, a label without a class name.
    Example:
      >>> images = np.zeros((3, 32, 32, 3), np.uint8)
      >>> dataset = dlc.array_dataset(images, ["cat", "dog", "cat"], ids=["a", "b", "c"])
      >>> dataset.class_names, dataset.labels.tolist()
      (('cat', 'dog'), [0, 1, 0])
    """
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    encoded, classes, table = encode_labels(values, class_names, name)
    unique = stable_ids([None] * len(images), images) if ids is None else checks.as_ids(name, ids)
    return Dataset(images, encoded, unique, classes, name, table, deep_images)
