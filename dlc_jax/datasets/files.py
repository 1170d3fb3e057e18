"""Images in files of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded images by position, read when asked for."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> bytes:
        return self.paths[position].read_bytes()
