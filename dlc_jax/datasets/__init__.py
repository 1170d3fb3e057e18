"""Source strings to data sets: `parquet:`, `folder:`, `tfds:` and `demo:`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dlc_jax import checks
from dlc_jax.datasets.arrays import array_dataset
from dlc_jax.datasets.folder import load_folder
from dlc_jax.datasets.parquet import load_demo, load_parquet
from dlc_jax.datasets.tfds import load_tfds
from dlc_jax.types import Dataset

__all__ = ["SOURCES", "array_dataset", "load_dataset"]

# scheme -> function of what follows the colon
SOURCES: dict[str, Callable[[str], Dataset]] = {
    "parquet": load_parquet,
    "folder": load_folder,
    "tfds": load_tfds,
    "demo": load_demo,
}


def load_dataset(source: str) -> Dataset:
    """Loads labelled images; nothing is decoded yet.

    Args:
      source: One of
        `parquet:<file, folder or glob>`: Hugging Face image convention (a column of
          {bytes, path} or of encoded bytes, and an integer or string label column);
        `folder:<root>`: one sub-folder of images per class;
        `tfds:<name>/<split>`: a prepared TensorFlow Datasets data set, e.g.
          `tfds:dtd/train+validation`;
        `demo:caltech15/train` or `demo:caltech15/test`: the bundled sample.
    Returns:
      The data set. Integer labels that are not 0..c-1 are remapped and the table kept in
      `label_table`; ids are the path below the root (folder), the image's path or file name where
      present and unique, and a hash of the content otherwise.
    Raises:
      ValueError: an unknown scheme, a missing file, a column that is not there, a sample without
        label or image, a class folder without images.
    """
    scheme, colon, rest = str(source).partition(":")
    if not colon or not rest:
        hint = f" Did you mean 'folder:{source}'?" if Path(source).is_dir() else ""
        raise checks.InputError(
            f"dataset: {str(source)!r} is no source; expected <scheme>:<where>, "
            f"with a scheme out of {', '.join(SOURCES)}.{hint}"
        )
    checks.one_of("dataset scheme", scheme, SOURCES)
    return SOURCES[scheme](rest)
