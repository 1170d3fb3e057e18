"""Files that sources read: images of their own, and shards by folder or glob."""

from __future__ import annotations

import dataclasses
import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dlc_jax import checks


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Encoded images by position, read when asked for.

    Attributes:
      root: What the names are relative to.
      names: POSIX paths, as an array: a million `Path`s would take half a gigabyte.
    """

    root: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> bytes:
        return regular(self.file(position)).read_bytes()

    def file(self, position: int) -> Path:
        """Returns the file of an image."""
        return self.root / str(self.names[position])


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


def matching(scheme: str, where: str, suffix: str) -> list[Path]:
    """Returns one file, those of a folder with this suffix, or those of a glob, in sorted order.

    Capitals in a suffix do not matter, and `**` in a glob stands for folders at any depth.

    Raises:
      ValueError: there is none, or one that is no regular file.
    """
    path = Path(where).expanduser()
    try:
        if path.is_dir():
            found = [file for file in path.iterdir() if file.name.lower().endswith(suffix)]
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [regular(file) for file in sorted(found) if not file.is_dir()]
    except OSError as error:
        raise checks.InputError(f"{scheme}:{where}: cannot be read: {error}.") from error
    if not files:
        raise checks.InputError(f"{scheme}:{where}: no such file, or no *{suffix} in it.")
    return files
