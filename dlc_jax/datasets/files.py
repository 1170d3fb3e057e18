"""Images in files of their own, `folder:`, `csv:`, `fgvc_aircraft:`, and files by folder or glob.

Source of FGVC-Aircraft: Maji et al. 2013, arXiv 1306.5151.
"""

from __future__ import annotations

import bisect
import csv
import dataclasses
import functools
import glob
import io
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.labels import PATH_COLUMNS, Columns, composed, integers_or_text, labelled
from dlc_jax.files.image_files import HEIF_SUFFIXES, NEEDS_HEIF, suffixes
from dlc_jax.types import Dataset, ImageSource, file_of

# What file managers, network storage and notebooks leave beside one's own files.
_JUNK = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "__pycache__", "lost+found", "system volume information",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
# Of names that begin with a dot, these hold nobody's images; others are counted as left out.
_HIDDEN_JUNK = re.compile(
    r"\._.*|\.ds_store|\.thumbnails|\.ipynb_checkpoints|\.git.*|\.directory|\.nomedia|\.picasa\.ini"
)
_TRAIN_PARTS = ("train", "training", "trainval", "val", "valid", "validation", "dev")
_TEST_PARTS = ("test", "testing", "eval", "evaluation")
_PARTS = "|".join((*_TRAIN_PARTS, *_TEST_PARTS))
_PART_NAME = re.compile(rf"({_PARTS})([^a-z].*)?|[a-z0-9].*[^a-z]({_PARTS})")


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
    """Images that are read when asked for; other processes get it pickled if its parts can be.

    Attributes:
      places: Where each image is, as `read` takes it; anything with `len` and integer indexing.
      read: Place -> the image.
      file_at: Place -> the file that holds this image alone; None where there are no such files.
    """

    places: Any
    read: Callable[[Any], bytes | np.ndarray]
    file_at: Callable[[Any], Path | None] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> bytes | np.ndarray:
        return self.read(self.places[position])

    def file(self, position: int) -> Path | None:
        """Returns the file that holds this image alone, see `file_of`."""
        return self.file_at(self.places[position]) if self.file_at else None


def images_in(root: Path, names: Sequence[str] | np.ndarray) -> LazyImages:
    """Returns the images in files, by POSIX paths relative to the root."""
    paths = np.asarray(names, np.str_)  # a million `Path`s would take half a gigabyte
    return LazyImages(paths, functools.partial(_read, root), root.joinpath)


def _read(root: Path, path: str) -> bytes:
    return regular(root / path).read_bytes()


def joined(sources: Sequence[ImageSource]) -> ImageSource:
    """Returns the images of one or more sources, one after the other."""
    if len(sources) == 1:
        return sources[0]
    starts = np.cumsum([0, *map(len, sources)]).tolist()
    read, file = (functools.partial(_of_part, f, sources, starts) for f in (getitem, file_of))
    return LazyImages(range(starts[-1]), read, file)


def _of_part(get: Callable, sources: Sequence[ImageSource], starts: list[int], place: int) -> Any:
    """Returns what `get` gives of a source and a position in it; the place is one among all."""
    number = bisect.bisect_right(starts, place) - 1
    return get(sources[number], place - starts[number])


def is_junk(name: str) -> bool:
    """Whether a file or folder is not the user's own: `@eaDir`, `Thumbs.db`, `._x`, ..."""
    return name.lower() in _JUNK or _HIDDEN_JUNK.fullmatch(name.lower()) is not None


def suffix_of(name: str) -> str:
    """Returns `.txt` for `notes.TXT`; `hidden` or `without suffix` where there is none."""
    if name.startswith("."):
        return "hidden"
    return Path(name).suffix.lower() or "without suffix"


def left_out_text(counts: Mapping[str, int]) -> str:
    """Returns `3 .heic, 1 .txt` for suffixes and their counts, and what would read them."""
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    text = expect.listed(f"{count} {expect.visible(suffix)}" for suffix, count in rows)
    return f"{text} ({NEEDS_HEIF})" if set(counts) & set(HEIF_SUFFIXES) else text


def split_in(name: str) -> str | None:
    """Returns `train` for `Train`, `train2017` or `images_train`; None if a name is no split's."""
    found = _PART_NAME.fullmatch(name.lower())
    return found and (found[1] or found[3])


def _check_are_of_one_kind(source: str, names: list[str]) -> None:
    """Raises if files of training and of test lie side by side, by what their names begin with."""
    words = {word[0] for name in names if (word := re.match("[a-z]+(?![a-z])", name, re.I))}
    parts = train_parts(words)
    tests = sorted(word for word in words if word.lower() in _TEST_PARTS)
    if parts and tests:
        raise expect.InputError(
            f"{source}: holds files of training ({', '.join(parts)}) and of test "
            f"({', '.join(tests)}); give those of one, "
            f"{source}/{parts[0]}*{Path(names[0]).suffix}."
        )


def train_parts(names: Iterable[str]) -> list[str]:
    """Returns the names of splits that one may train on, training first."""
    found = {name for name in names if split_in(name) in _TRAIN_PARTS}
    return sorted(found, key=lambda name: (_TRAIN_PARTS.index(split_in(name)), name))


def posix_names(root: Path, names: Iterable[str]) -> list[str]:
    """Returns paths with slashes where they have the backslashes of Windows.

    One that names a file as it is, with a backslash in its name, stays.
    """
    return [
        name if "\\" not in name or os.path.exists(root / name) else name.replace("\\", "/")
        for name in names
    ]


def regular(file: Path) -> Path:
    """Returns the file; OSError if it is a pipe or a device, of which reading might never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file}: not a regular file")
    return file


def matching(scheme: str, where: str, endings: tuple[str, ...] = ()) -> list[Path]:
    """Returns one file, those of a folder, or those of a glob, in sorted order.

    Capitals in a suffix do not matter, and `**` in a glob stands for folders at any depth.

    Args:
      scheme: What messages call the source.
      where: The file, folder or glob.
      endings: Suffixes of the files of a folder; none: the scheme is the suffix.
    Raises:
      ValueError: there is none, or one that is no regular file.
    """
    path, source, endings = (
        Path(where).expanduser(),
        f"{scheme}:{where}",
        endings or (f".{scheme}",),
    )
    with expect.refusing(f"{source}: cannot be read", OSError):
        if path.is_dir():
            names = (name for name in os.listdir(path) if name.lower().endswith(endings))
            found = [path / name for name in names if not is_junk(name)]
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [regular(file) for file in sorted(found) if not file.is_dir()]
    if path.is_dir():
        _check_are_of_one_kind(source, [file.name for file in files])
    if not files:
        shown = ", ".join(f"*{ending}" for ending in endings)
        raise expect.InputError(f"{source}: no such file, or no {shown} in it.")
    return files


def load_folder(where: str) -> Dataset:
    """Loads `<root>/<class name>/**/<image>`; classes and images in sorted order, hidden ones not.

    Classes are named in Unicode's composed form (NFC); two folders of the same name are one class.
    A folder without images is no class; `empty_classes` lists it.

    Raises:
      ValueError: no such folder, no image in a sub-folder, sub-folders that are splits, a class all
        of whose images are HEIC that cannot be read here, or a folder that may not be read.
    """
    root = Path(where).expanduser()
    with expect.refusing(f"folder:{where}: cannot be read", OSError):
        if not root.is_dir():
            raise expect.InputError(f"folder:{where}: no such folder.")
        entries = [path for path in sorted(root.iterdir()) if not is_junk(path.name)]
        folders = [path.name for path in entries if path.is_dir() and path.name[0] != "."]
        left_out = Counter(suffix_of(path.name) for path in entries if not path.is_dir())
        if not folders:
            raise expect.InputError(
                f"folder:{where}: expected one sub-folder of images per class, found none."
            )
        images = {}
        for name in folders:
            images[name], others = _images_below(root, name)
            if not images[name] and set(others) & set(HEIF_SUFFIXES):
                raise expect.InputError(
                    f"folder:{where}: class {name!r} has no image that can be read, but "
                    f"{sum(others[suffix] for suffix in HEIF_SUFFIXES)} HEIC; {NEEDS_HEIF}."
                )
            left_out += others
        _check_are_classes(where, images)
        filled = [name for name in folders if images[name]]
        names = np.asarray([image for name in filled for image in images[name]], np.str_)
        return labelled(
            images_in(root, names),
            [name for name in filled for _ in images[name]],
            names,
            f"folder:{where}",
            left_out=dict(left_out),
            empty_classes=tuple(sorted({*map(composed, folders)} - {*map(composed, filled)})),
        )


def _check_are_classes(where: str, images: dict[str, list[str]]) -> None:
    """Raises if there is no image, or if the folders are splits with classes in them."""
    filled = [name for name in images if images[name]]
    if not filled:
        raise expect.InputError(
            f"folder:{where}: no image in its sub-folders {expect.listed(images)} (looked for "
            f"{', '.join(suffixes())})."
        )
    is_nested = all(image.count("/") > 1 for name in filled for image in images[name])
    are_splits = all(map(split_in, filled))
    if len(filled) == 1 or any(split_in(name) != name.lower() for name in filled):
        are_splits &= is_nested  # a class may be called train, or train_station
    if not are_splits:
        return
    parts = train_parts(filled)
    hint = "give one of them that is for training"
    if parts:
        hint = f"give one, folder:{where}/{parts[0]}"
    if len(parts) > 1:
        hint += f", or what is for training, folder:{where}/{'+'.join(parts)}"
    raise expect.InputError(
        f"folder:{where}: its sub-folders are splits ({', '.join(filled)}), not classes; {hint}."
    )


def _refuse(error: OSError) -> None:  # left alone, os.walk would pass over what it may not read
    raise error


def _images_below(root: Path, class_name: str) -> tuple[list[str], Counter[str]]:
    """Returns the images of a class, relative to the root, and what else its folder holds.

    Images at any depth are in the order of their paths; of other files it is the suffixes, and how
    often each occurs.
    """
    found, others, seen = [], Counter[str](), set()
    readable = suffixes()
    for parent, folders, names in os.walk(root / class_name, onerror=_refuse, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if name[0] != "." and not is_junk(name))
        below = os.path.relpath(parent, root)
        for name in itertools.filterfalse(is_junk, names):
            if name[0] == "." or not name.lower().endswith(readable):
                others[suffix_of(name)] += 1
            else:
                found.append(f"{below}/{name}")
    return sorted(found, key=lambda name: name.split("/")), others


def load_aircraft(where: str) -> Dataset:
    """Loads `<root>/<split>`, with `data/images_variant_<split>.txt` below the root.

    Raises:
      ValueError: an unknown split, a list that is not there or a line that is not `<id> <variant>`.
    """
    source = f"fgvc_aircraft:{where}"
    root, _, split = where.rpartition("/")
    expect.one_of(f"{source}: split", split, ("train", "val", "trainval", "test"))
    data = Path(root).expanduser()
    data = data / "data" if (data / "data").is_dir() else data
    names, variants = [], []
    for number, line in enumerate(_lines(source, data / f"images_variant_{split}.txt"), start=1):
        name, space, variant = line.partition(" ")
        if not space or not name.isdigit():
            raise expect.InputError(
                f"{source}: images_variant_{split}.txt, line {number}: expected "
                f"'<id> <variant>', found {line!r}."
            )
        names.append(f"images/{name}.jpg")
        variants.append(variant.strip())
    classes = _lines(source, data / "variants.txt")
    return labelled(images_in(data, names), variants, names, source, classes)


def _lines(source: str, file: Path) -> list[str]:
    with expect.refusing(f"{source}: {file} cannot be read", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise expect.InputError(f"{source}: {file} is empty.")
    return lines


def load_csv(where: str, columns: Columns) -> Dataset:
    """Loads `<file>.csv`, or `.tsv` with tabs, with a header line, capitals in which do not matter.

    Paths are relative to the table's folder, or absolute; they may have backslashes. Labels that
    are all integers (of at most 18 digits, written plainly) are class ids; others are names.

    Raises:
      ValueError: no such file, not UTF-8 text, no path or label column or several, a row
        without either.
    """
    source, file = f"csv:{where}", Path(where).expanduser()
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with expect.refusing(f"{source}: cannot be read as UTF-8 text", OSError, ValueError):
        text = regular(file).read_text(encoding="utf-8-sig")
    with expect.refusing(f"{source}: not a table of values", csv.Error):
        lines = io.StringIO(text, newline="")  # splitlines would part rows at U+2028, too
        rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    if len(rows) < 2:
        raise expect.InputError(f"{source}: expected a header and one or more rows, found fewer.")
    header = [name.strip() for name in rows[0]]
    path_column = header.index(columns.find(source, "path", header, PATH_COLUMNS))
    label_column = header.index(columns.find(source, "label", header))
    names, values = [], []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise expect.InputError(
                f"{source}: row {number} has {len(row)} values, expected {len(header)}."
            )
        name, label = row[path_column].strip(), row[label_column].strip()
        if not name or not label or "\0" in name:
            raise expect.InputError(f"{source}: row {number} has no path or no label: {row}.")
        names.append(name)
        values.append(label)
    names = posix_names(file.parent, names)
    return labelled(images_in(file.parent, names), integers_or_text(values), names, source)
