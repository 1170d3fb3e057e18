"""A selection as the paper's released PyTorch code reads it: positions in its training set.

That code trains on torchvision's training and validation parts of a data set, one after the other,
and loads positions in them from a path that names every setting. torchvision is not needed here.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.files import regular
from dlc_jax.datasets.labels import composed
from dlc_jax.exports import part_positions
from dlc_jax.exports.forms import FOLDER_SUFFIXES
from dlc_jax.files.image_files import SUFFIXES
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess.decode import decode
from dlc_jax.selection import Cell
from dlc_jax.types import Dataset, Selection

PRETRAINS = ("fully", "weakly")
_ARCHITECTURES = {"vit_small_patch16_224": "vit_small", "vit_base_patch16_224": "vit_base"}
_CELLS = {"easiest": "e", "hardest": "h"}


class Entry(NamedTuple):
    """A sample of the released code's training set."""

    class_name: str
    path: Path

    @property
    def key(self) -> tuple[str, str]:
        """Class and file name as samples are found by them."""
        return _key(self.class_name, self.path.name)


def released_order(datasets_dir: str | Path, name: str) -> list[Entry]:
    """Returns the training set of the released code, in torchvision's order.

    Args:
      datasets_dir: What its `--datasets_dir` is.
      name: `DTD` (partition 1), `FGVCAircraft`, or the folder of any other data set, with `train`
        and `val` and a sub-folder per class in both.
    Raises:
      ValueError: a folder or list that is not there, a line that torchvision would not take, or
        classes that torchvision would number differently in the two parts.
    """
    check_name(name)
    root = Path(datasets_dir).expanduser()
    read = _LAYOUTS.get(name, _read_folder)
    train, val = (list(read(root, name, split)) for split in ("train", "val"))
    classes, other = ({entry.class_name for entry in part} for part in (train, val))
    if classes != other and read is not _read_aircraft:  # that one has a list of all classes
        raise expect.InputError(
            f"{name} in {root}: class {min(classes ^ other)!r} is in one of train and val only; "
            "expected the same classes in both, or torchvision numbers them differently."
        )
    return train + val


def released_positions(
    dataset: Dataset,
    kept: Selection | np.ndarray | Sequence[int],
    datasets_dir: str | Path,
    name: str,
    part: str = "kept",
) -> Int64[np.ndarray, " k"]:
    """Returns the positions of kept or dropped samples in the released order, ascending.

    Args:
      dataset: What `kept` was selected from; any order, any source whose ids are file names.
      kept: A `Selection`, or positions in the data set.
      datasets_dir, name: See `released_order`.
      part: `kept` or `dropped`.
    Raises:
      ValueError: see `export`, `released_order` and `match_samples`.
    """
    _, samples = part_positions(dataset, kept, part, dataset.name)
    return np.sort(match_samples(dataset, samples, datasets_dir, name))


def match_samples(
    dataset: Dataset, samples: Int64[np.ndarray, " k"], datasets_dir: str | Path, name: str
) -> Int64[np.ndarray, " k"]:
    """Returns where each of these samples is in the released order, by class and file name.

    Where a class has a file name twice, the one with more of its folders in common is taken. The
    images are compared: the same bytes, or the same RGB pixels.

    Args:
      dataset: Holds the samples.
      samples: Positions in the data set.
      datasets_dir, name: See `released_order`.
    Raises:
      ValueError: an id that is no file name, a sample that is not in the order or could be one of
        several, two that could be the same, or a file with another image.
    """
    order = released_order(datasets_dir, name)
    entries = _by_key([entry.key for entry in order])
    paths = [PurePosixPath(i) for i in dataset.ids.tolist()]
    keys = _keys(dataset)
    namesakes = _by_key(keys)
    found = np.empty(len(samples), np.int64)
    for place, index in enumerate(samples.tolist()):
        key = keys[index]
        if key not in entries:
            raise _not_there(dataset, index, key, f"{name} in {datasets_dir}")
        ids = {i: paths[i] for i in namesakes[key]}
        files = {position: order[position].path for position in entries[key]}
        found[place] = _match(dataset.name, index, ids, files)
    for index, position in zip(samples.tolist(), found.tolist(), strict=True):
        _check_same_image(dataset, index, order[position].path)
    return found


def check_names_match(
    dataset: Dataset, datasets_dir: str | Path, name: str, *, all_of_them: bool
) -> None:
    """Raises ValueError where `match_samples` is sure to: no image is read.

    Args:
      dataset, datasets_dir, name: As there.
      all_of_them: Whether all samples will be looked for, or only some that are not known yet.
    """
    there = {entry.key for entry in released_order(datasets_dir, name)}
    keys = _keys(dataset)
    lost = [index for index, key in enumerate(keys) if key not in there]
    if len(lost) == len(keys) or (all_of_them and lost):
        raise _not_there(dataset, lost[0], keys[lost[0]], f"{name} in {datasets_dir}")


def _keys(dataset: Dataset) -> list[tuple[str, str]]:
    """Returns class and file name of every sample."""
    return [
        _key(dataset.class_names[label], PurePosixPath(sample).name)
        for label, sample in zip(dataset.labels.tolist(), dataset.ids.tolist(), strict=True)
    ]


def released_path(
    root: str | Path, cell: Cell, path: PathSpec, *, name: str, pretrain: str, arch: str
) -> Path:
    """Returns where the released code looks for a selection, `--idxs_dir` being the root.

    Args:
      root: Folder of all selections.
      cell: Its method has a name there: `flexrand`, `easiest`, `hardest`, or a baseline, whose
        underscores go. `--ratio` is 100 times its keep fraction.
      path: The scores'; masking, step and number of probes are in the name of the first three
        methods only.
      name: Data set, as in `released_order`.
      pretrain: `fully` or `weakly`.
      arch: Encoder, by the name it has here.
    Raises:
      ValueError: a name that is no folder name, an unknown `pretrain`, or a split (step) that the
        released code's name of it, in whole percent (thousandths), cannot hold.
    Source: released score-wot.py and finetune.py (method Q12).
    """
    check_name(name)
    expect.one_of("export.pretrain", pretrain, PRETRAINS)
    principle = cell.method.replace("_", "")
    if needs_grid(cell.method):
        kept = _CELLS.get(cell.method) or f"s{_whole('split', cell.split, 100)}"
        probes = f"i{_whole('probe.step', path.step, 1000)}_f{path.num_probes}"
        principle = f"lwot-{path.masking}-{kept}-{probes}"
    ratio = round(float(cell.keep_fraction) * 100, 9)  # 0.1 + 0.2 is meant as 30
    folder = f"pt_{pretrain}-arch_{_ARCHITECTURES.get(arch, arch)}"
    return Path(root) / f"seed_{cell.seed}" / name / principle / folder / f"{ratio / 100}.npy"


def needs_grid(method: str) -> bool:
    """Whether the name holds the probes, of which the released code has grid steps 0..m-1 only."""
    return method == "flexrand" or method in _CELLS


def check_name(name: str) -> None:
    """Raises ValueError unless the name is that of a folder."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise expect.InputError(
            f"export.released_name: expected what the released code's --dataset is, such as DTD, "
            f"got {name!r}."
        )


def _whole(name: str, value: Any, parts: int) -> int:
    expect.at_least(name, value, 0, exclusive=True)
    expect.at_most(name, value, 1, exclusive=True)
    whole = round(value * parts)
    if whole < 1 or abs(value * parts - whole) > 1e-9:
        raise expect.InputError(
            f"{name}: the released layout has whole multiples of {1 / parts} only, got {value!r}."
        )
    return whole


def _read_dtd(root: Path, name: str, split: str) -> Iterator[Entry]:
    data = root / "dtd" / "dtd"
    for words in _lines(data / "labels" / f"{split}1.txt", "/", "<class>/<file>"):
        yield Entry(words[0], data / "images" / "/".join(words))


def _read_aircraft(root: Path, name: str, split: str) -> Iterator[Entry]:
    data = root / "fgvc-aircraft-2013b" / "data"
    for image, variant in _lines(data / f"images_variant_{split}.txt", " ", "<id> <variant>"):
        yield Entry(variant, data / "images" / f"{image}.jpg")


_LAYOUTS: Mapping[str, Callable[[Path, str, str], Iterator[Entry]]] = {
    "DTD": _read_dtd,
    "FGVCAircraft": _read_aircraft,
}


def _lines(file: Path, separator: str, expected: str) -> Iterator[tuple[str, str]]:
    """Gives both words of every line; none may be empty or lack one, or positions would shift."""
    with expect.refusing(f"{file}: cannot be read, expected a list", OSError, ValueError):
        lines = regular(file).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        first, _, second = line.strip().partition(separator)
        if not first or not second or (separator == "/" and "/" in second):
            raise expect.InputError(f"{file}, line {number}: expected {expected}, found {line!r}.")
        yield first, second


def _read_folder(root: Path, name: str, split: str) -> Iterator[Entry]:
    folder = root / name / split
    if not folder.is_dir():
        raise expect.InputError(
            f"{folder}: no such folder; expected train and val in {root / name}, a sub-folder per "
            f"class in each (only {' and '.join(_LAYOUTS)} have other layouts)."
        )
    # hidden folders and files count, and folders go before what is below them: as in torchvision
    for class_name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        paths = [
            Path(parent) / file
            for parent, _, files in sorted(os.walk(folder / class_name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(FOLDER_SUFFIXES)
        ]
        if not paths:
            raise expect.InputError(
                f"{folder / class_name}: expected images ({', '.join(FOLDER_SUFFIXES)}), "
                "found none; torchvision takes every folder for a class."
            )
        for path in paths:
            yield Entry(class_name, path)


def _key(class_name: str, file_name: str) -> tuple[str, str]:
    """Returns class and file name in one Unicode form: not all file systems keep theirs."""
    return composed(class_name), composed(file_name)


def _by_key(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    places = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return dict(places)


def _match(
    where: str, index: int, ids: Mapping[int, PurePath], files: Mapping[int, PurePath]
) -> int:
    """Returns the key of the file that is a sample's, out of files and ids of the same name."""
    near = _nearest(ids[index], files)
    if len(near) > 1:
        raise expect.InputError(
            f"{where}: id {ids[index]} could be {files[near[0]]} or {files[near[1]]}; expected an "
            "id whose folders tell them apart, such as train/<class>/<file> (sources joined by + "
            "get such ids where they are needed)."
        )
    rivals = [i for i in _nearest(files[near[0]], ids) if i != index]
    if rivals:
        raise expect.InputError(
            f"{where}: ids {ids[index]} and {ids[rivals[0]]} could both be {files[near[0]]}; "
            "expected one sample for each file."
        )
    return near[0]


def _nearest(path: PurePath, others: Mapping[int, PurePath]) -> list[int]:
    """Returns the keys of the paths that have most of their last components in common with it."""
    depths = {}
    for key, other in others.items():
        pairs = zip(reversed(path.parts), reversed(other.parts), strict=False)
        depths[key] = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
    most = max(depths.values())
    return [key for key, depth in depths.items() if depth == most]


def _not_there(dataset: Dataset, index: int, key: tuple[str, str], where: str) -> expect.InputError:
    name = str(dataset.ids[index])
    if not key[1].lower().endswith(SUFFIXES):
        return expect.InputError(
            f"{dataset.name}: id {name!r} is no file name, by which samples are found in {where}; "
            "expected ids such as banded/banded_0002.jpg."
        )
    return expect.InputError(
        f"{dataset.name}: sample {name!r} is not in train and val of {where}; expected a file "
        f"{key[1]!r} of class {key[0]!r} there."
    )


def _check_same_image(dataset: Dataset, index: int, path: Path) -> None:
    """Raises unless the file has the sample's bytes, or decodes to the same RGB pixels."""
    name = f"{dataset.name}: sample {dataset.ids[index]}"
    with expect.refusing(f"{name} cannot be compared with {path}", OSError):
        sample, content = dataset[index], regular(path).read_bytes()
    if not isinstance(sample.image, np.ndarray) and sample.image == content:
        return
    held = decode(sample.image, sample.id, dataset.deep_images)
    found = decode(content, str(path), dataset.deep_images)
    if held.size != found.size or held.tobytes() != found.tobytes():
        sizes = " and ".join(f"{width} x {height}" for width, height in (found.size, held.size))
        raise expect.InputError(
            f"{path}: holds another image than sample {sample.id!r} of {dataset.name} ({sizes}); "
            "expected the same pixels."
        )
