"""Source strings to data sets: `folder:`, `parquet:`, `csv:` and the others in SOURCES.

Parts as in `train+validation` are joined here; `split:` is a part of a seeded, stratified split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.arrays import array_dataset, load_npz
from dlc_jax.datasets.files import joined, load_aircraft, load_csv, load_folder
from dlc_jax.datasets.labels import Columns
from dlc_jax.datasets.tables import load_demo, load_hf, load_parquet
from dlc_jax.datasets.tfds import load_tfds
from dlc_jax.datasets.webdataset import load_tar
from dlc_jax.types import Dataset

_SUFFIXES = (".csv", ".tsv", ".npz", ".parquet", ".tar")


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
    has_none = scheme in _WITHOUT_COLUMNS
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


def part_sources(where: str) -> list[str]:
    """Returns the sources that `<place>/<part>+<part>` stands for; one where it has no parts.

    A suffix of the last part is that of all: `lists/train+val.csv`.
    """
    place, slash, last = where.rpartition("/")
    if "+" not in last or Path(where).expanduser().exists():
        return [where]
    suffix = Path(last).suffix
    if suffix.lower() not in _SUFFIXES:  # of v1.0+v1.1, the .1 is none
        suffix = ""
    return [f"{place}{slash}{part.removesuffix(suffix)}{suffix}" for part in last.split("+")]


def concatenate(parts: Sequence[Dataset], names: Sequence[str], source: str) -> Dataset:
    """Returns all samples in order; classes are matched by name, and a part may lack some.

    Args:
      parts: Data sets.
      names: Names that tell ids apart where an id occurs in two of the data sets.
      source: Name of the result.
    """
    class_names = parts[0].class_names
    if any(part.class_names != class_names for part in parts):
        united = {name for part in parts for name in part.class_names}
        numbers = sorted(filter(str.isdecimal, united), key=lambda name: (int(name), name))
        class_names = (*numbers, *sorted(united - {*numbers}))
    places = {name: label for label, name in enumerate(class_names)}
    labels = [np.array([places[n] for n in p.class_names], np.int32)[p.labels] for p in parts]
    ids = [part.ids.tolist() for part in parts]
    if len(set().union(*ids)) < sum(map(len, ids)):
        ids = [[f"{name}/{i}" for i in mine] for name, mine in zip(names, ids, strict=True)]
    tables = {key: new for part in parts for key, new in (part.label_table or {}).items()}
    return Dataset(
        images=joined([part.images for part in parts]),
        labels=np.concatenate(labels),
        ids=np.asarray([name for mine in ids for name in mine], np.str_),
        class_names=class_names,
        name=source,
        label_table={key: places[str(key)] for key in tables} or None,
        left_out=dict(sum((Counter(part.left_out) for part in parts), Counter())),
        empty_classes=tuple(sorted({n for p in parts for n in p.empty_classes} - {*class_names})),
    )


PARTS = ("train", "validation", "test")
_NUMBERS = re.compile(r"([0-9]{1,3}(?:/[0-9]{1,3}){1,2})(?:@([0-9]{1,10}))?")


def stratified_split(
    dataset: Dataset, percents: Sequence[int], seed: int = 0
) -> tuple[Dataset, ...]:
    """Returns disjoint parts that cover the data set, cut class by class.

    The n_j samples of a class are sorted by the SHA-256 of seed and id and cut at
    round(n_j * percent / 100), percent running over 0, the first, the first two, ..., 100; halves
    round to even. Which part a sample is in therefore hangs on the seed and the ids of its class
    alone, not on the order of the data set.

    Args:
      dataset: n samples.
      percents: Two or three integers >= 0 that add up to 100: train, validation and, of three,
        test.
      seed: In [0, 2**32); another one gives another split.
    Returns:
      One data set per percent. Each keeps the order of the data set and all its class names; a
      class too small for its share of a part has no sample there.
    Raises:
      ValueError: percents that are not such integers, a seed out of range, or a part that is left
        without any sample, which one of 0 % always is (the source `split:80/0/20:...` leaves it
        out).
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train")
      >>> train, validation = dlc.stratified_split(dataset, [80, 20], seed=1)
      >>> len(train), len(validation), {*train.ids} & {*validation.ids}
      (600, 150, set())
    """
    _check("stratified_split", percents, seed)
    places = range(len(percents))
    part = _part_of_each(f"stratified_split of {dataset.name}", dataset, percents, seed, places)
    return tuple(dataset.subset(np.flatnonzero(part == place)) for place in places)


def load_split(where: str, columns: Columns) -> Dataset:
    """Loads parts of a split of another source, in its order.

    Args:
      where: `<train>/<validation>[/<test>][@<seed>]:<parts>:<source>`; seed 0 where none is given,
        parts are one or more of train, validation, test joined by `+`.
      columns: Columns of the other source.
    Raises:
      ValueError: another form, percents that do not add up to 100, an unknown, repeated or empty
        part; and whatever the other source raises.
    """
    name = f"split:{where}"
    # no more than the two first colons are ours: the source has one, and its path may have others
    numbers, _, rest = where.partition(":")
    parts, _, source = rest.partition(":")
    match = _NUMBERS.fullmatch(numbers)
    if not match or not parts or not source:
        raise expect.InputError(
            f"{name}: expected split:<train>/<validation>[/<test>][@<seed>]:<parts>:<source>, "
            "e.g. split:60/20/20:train+validation:folder:/data/x."
        )
    percents = [int(number) for number in match[1].split("/")]
    seed = int(match[2] or 0)
    _check(name, percents, seed)
    wanted = parts.split("+")
    for part in wanted:
        expect.one_of(f"{name}: part of {match[1]}", part, PARTS[: len(percents)])
    expect.no_repetition(f"{name}: parts", np.asarray(wanted))
    dataset = load_dataset(source, image_column=columns.image, label_column=columns.label)
    places = [*map(PARTS.index, wanted)]
    part_of_each = _part_of_each(name, dataset, percents, seed, places)
    chosen = dataset.subset(np.flatnonzero(np.isin(part_of_each, places)))
    return dataclasses.replace(chosen, name=name)


def _check(where: str, percents: Sequence[int], seed: int) -> None:
    shown = "/".join(map(str, percents))
    if len(percents) not in (2, 3):
        raise expect.InputError(
            f"{where}: expected two or three percents (train, validation, test), got {shown!r}."
        )
    for name, percent in zip(PARTS, percents, strict=False):
        expect.integer(f"{where}: percent of {name}", percent, 0)
    if sum(percents) != 100:
        raise expect.InputError(
            f"{where}: expected percents that add up to 100, got {shown}, which make "
            f"{sum(percents)}."
        )
    expect.seed(seed, f"{where}: seed")


def _part_of_each(
    where: str, dataset: Dataset, percents: Sequence[int], seed: int, wanted: Sequence[int]
) -> Int64[np.ndarray, " n"]:
    """Returns the place among `percents` of the part that each sample is in.

    Raises:
      ValueError: a part at a wanted place is empty.
    """
    digests = [hashlib.sha256(f"{int(seed)}\0{name}".encode()).hexdigest() for name in dataset.ids]
    keys = np.asarray(digests)
    totals = np.cumsum(percents)[:-1].tolist()
    part = np.empty(len(dataset), np.int64)
    for label in np.unique(dataset.labels):
        members = np.flatnonzero(dataset.labels == label)
        members = members[np.argsort(keys[members])]
        cuts = [round(len(members) * total / 100) for total in totals]
        part[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    for place in wanted:
        if not np.any(part == place):
            raise expect.InputError(
                f"{where}: the part {PARTS[place]} ({percents[place]} %) is empty; expected a "
                f"percent large enough for a sample of the largest class, which has "
                f"{np.bincount(dataset.labels).max()}."
            )
    return part


_WITHOUT_COLUMNS = ("folder", "fgvc_aircraft")
# scheme -> function of what follows the colon, and of the columns unless there are none
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
    "split": load_split,
}
