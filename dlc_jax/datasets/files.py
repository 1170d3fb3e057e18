"""Files that sources read: images of their own, and shards by folder or glob."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.expect import visible
from dlc_jax.files.image_files import HEIF_SUFFIXES, NEEDS_HEIF
from dlc_jax.types import ImageSource, file_of

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
      file_at: Place -> the file that holds this image alone, if such files there are.
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


def _of_part(
    get: Callable[[ImageSource, int], Any],
    sources: Sequence[ImageSource],
    starts: list[int],
    position: int,
) -> Any:
    """Returns what `get` gives of the source that has this position of all, and of its own."""
    number = bisect.bisect_right(starts, position) - 1
    return get(sources[number], position - starts[number])


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
    text = expect.listed(f"{count} {visible(suffix)}" for suffix, count in rows)
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


def matching(scheme: str, where: str) -> list[Path]:
    """Returns one file, those of a folder, or those of a glob, in sorted order.

    In a folder, the scheme is the suffix. Capitals in it do not matter, and `**` in a glob stands
    for folders at any depth.

    Raises:
      ValueError: there is none, or one that is no regular file.
    """
    path, source, suffix = Path(where).expanduser(), f"{scheme}:{where}", f".{scheme}"
    with expect.refusing(f"{source}: cannot be read", OSError):
        if path.is_dir():
            names = (name for name in os.listdir(path) if name.lower().endswith(suffix))
            found = [path / name for name in names if not is_junk(name)]
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [regular(file) for file in sorted(found) if not file.is_dir()]
    if path.is_dir():
        _check_are_of_one_kind(source, [file.name for file in files])
    if not files:
        raise expect.InputError(f"{source}: no such file, or no *{suffix} in it.")
    return files
