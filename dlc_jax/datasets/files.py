"""Files that sources read: images of their own, and shards by folder or glob."""

from __future__ import annotations

import dataclasses
import glob
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
        return self.file(position).read_bytes()

    def file(self, position: int) -> Path:
        """Returns the file of an image."""
        return self.root / str(self.names[position])


def matching(scheme: str, where: str, suffix: str) -> list[Path]:
    """Returns one file, those of a folder with this suffix, or those of a glob, in sorted order.

    Raises:
      ValueError: there is none.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        files = sorted(path.glob(f"*{suffix}"))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path)))
    if not files:
        raise checks.InputError(f"{scheme}:{where}: no such file, or no *{suffix} in it.")
    return files
