"""Source strings to data sets: `folder:`, `parquet:`, `csv:` and the others in SOURCES."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from dlc_jax import expect
from dlc_jax.datasets.arrays import array_dataset, load_npz
from dlc_jax.datasets.files import load_aircraft, load_csv, load_folder
from dlc_jax.datasets.huggingface import load_hf
from dlc_jax.datasets.labels import Columns
from dlc_jax.datasets.splits import concatenate, load_split, part_sources, stratified_split
from dlc_jax.datasets.tables import load_demo, load_parquet
from dlc_jax.datasets.tfds import load_tfds
from dlc_jax.datasets.webdataset import load_tar
from dlc_jax.types import Dataset


def _load_split(where: str, columns: Columns) -> Dataset:
    load = functools.partial(load_dataset, image_column=columns.image, label_column=columns.label)
    return load_split(where, load)


# scheme -> function of what follows the colon, and of the columns where there are some
SOURCES: dict[str, Callable[..., Dataset]] = {
    "parquet": load_parquet,
    "folder": load_folder,
    "csv": load_csv,
    "npz": load_npz,
    "tar": load_tar,
    "hf": load_hf,
    "tfds": load_tfds,
    "fgvc_aircraft": load_aircraft,
    "demo": load_demo,
    "split": _load_split,
}


def load_dataset(
    source: str,
    *,
    deep_images: str = Dataset.deep_images,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Loads labelled images; nothing is decoded yet.

    Args:
      source: One of
        `parquet:<file, folder or glob>`: Hugging Face image convention (a column of
          {bytes, path} or of encoded bytes, and an integer or string label column);
        `folder:<root>`: one sub-folder of images per class;
        `csv:<file>`: a table with a path and a label column;
        `npz:<file>`: arrays `images` (uint8) and `labels`;
        `tar:<file, folder or glob>`: WebDataset shards, an image and .cls or .json per sample;
        `hf:<owner/name or folder>/<split>`: Hugging Face hub, or a local copy;
        `fgvc_aircraft:<root>/<split>`: the official archive;
        `tfds:<name>/<split>`: a prepared TensorFlow Datasets data set, e.g.
          `tfds:dtd/train+validation`;
        `demo:caltech15/train` or `demo:caltech15/test`: the bundled sample;
        `split:<train>/<validation>[/<test>][@<seed>]:<parts>:<source>`: parts of a seeded,
          stratified split, in percent, of any other source, e.g.
          `split:60/20/20:train+validation:tfds:deep_weeds/train` or
          `split:80/0/20@7:test:folder:/data/x` (see `stratified_split`).
        Parts of any of them are joined by `+` in the last place: `folder:/data/x/train+val`.
      deep_images: How more than 8 bits a channel become 8: `error`, `full_range`, `min_max` or
        `clip`; see `Dataset`.
      image_column: Column of the images; in `npz:` an array, in `tfds:` a feature, in `tar:` a
        suffix. None takes the usual names, `image` first, and those declared to hold images.
      label_column: The same of the labels, `label` first; in `tar:` a key of the `.json`.
    Returns:
      The data set. Integer labels are remapped to 0..c-1 where they are not that already, or where
      a declared class has no sample; `label_table` maps the original ones, `empty_classes` names
      those classes, and `left_out` counts the files that are not read. Ids are the path below the
      root (folder), the image's path or file name where present and unique, and a hash of the
      content otherwise.
    Raises:
      ValueError: an unknown scheme, a missing file, a column that is not there or may be one of
        several, a source without columns where one is given, a sample without label or image,
        sub-folders that are splits, a split with an empty part.
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train")
      >>> len(dataset), dataset.num_classes, dataset[0].id
      (750, 15, 'bonsai/image_0023.jpg')
    """
    scheme, colon, rest = str(source).partition(":")
    if not colon or not rest:
        hint = f" Did you mean 'folder:{source}'?" if Path(source).is_dir() else ""
        raise expect.InputError(
            f"dataset: {str(source)!r} is no source; expected <scheme>:<where>, "
            f"with a scheme out of {', '.join(SOURCES)}.{hint}"
        )
    expect.one_of("dataset scheme", scheme, SOURCES)
    # these read parts themselves
    wheres = [rest] if scheme in ("tfds", "hf", "split") else part_sources(rest)
    columns = Columns(image_column, label_column)
    has_none = scheme in ("folder", "fgvc_aircraft")
    if has_none and columns != Columns():
        raise expect.InputError(
            "dataset.image_column, dataset.label_column: "
            f"{str(source)!r} has no columns; expected neither with it."
        )
    given = () if has_none else (columns,)
    parts = [SOURCES[scheme](where, *given) for where in wheres]
    dataset = parts[0]
    if len(parts) > 1:
        names = [where.rpartition("/")[2] for where in wheres]
        dataset = concatenate(parts, names, f"{scheme}:{rest}")
    dataset = dataset.without_empty_classes()
    if dataset.deep_images == deep_images:
        return dataset
    return dataclasses.replace(dataset, deep_images=deep_images)
