"""Finished parts of a measurement, in a folder that all processes share, or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.distributed import processes
from dlc_jax.files import array_files
from dlc_jax.workspace import artefacts


class Parts:
    """Arrays by the name of the part.

    Args:
      folder: Where they are kept, for later runs too; None: in memory.
      writes: Whether this process writes there; another that computed the same does where not.
    """

    def __init__(self, folder: Path | None = None, *, writes: bool = True):
        self.folder, self._writes = folder, writes
        self._in_memory: dict[str, dict[str, np.ndarray]] = {}
        self._pull()

    def has(self, name: str) -> bool:
        """Whether a part is there, whole."""
        return bool(self._read(name))

    def write(self, name: str, **arrays: np.ndarray) -> None:
        """Keeps a part, whole or not at all."""
        if self.folder is None:
            self._in_memory[name] = arrays
            return
        if not self._writes:
            return
        with artefacts.atomic(self._path(name)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def wait_for_all(self, names: Sequence[str]) -> None:
        """Returns when every process has written its parts.

        Raises:
          ValueError: a part is not there then: the processes do not share a folder.
        """
        if self.folder is None or processes.count() == 1:
            return
        processes.wait_for_all()
        self._pull()
        missing = [name for name in names if not self._path(name).is_file()]
        if missing:
            raise checks.InputError(
                f"{self.folder}: {len(missing)} parts that other processes wrote are not there, "
                f"such as {missing[0]}; expected a folder that all {processes.count()} processes "
                "share, or one in a bucket."
            )

    def take(self, name: str) -> dict[str, np.ndarray]:
        """Returns a part that was written; one in memory is not kept any longer."""
        found = self._in_memory.pop(name, None) or self._read(name)
        if not found:
            raise checks.InputError(
                f"{self._path(name)}: cannot be read any more; the same call computes it again."
            )
        return found

    def _pull(self) -> None:
        """Brings what others wrote, where processes do not share a file system."""
        if self.folder is not None:
            artefacts.pull(self.folder)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npz"

    def _read(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays of a part; none if it is not there or cannot be read."""
        if self.folder is None:
            return self._in_memory.get(name, {})
        try:
            headers = array_files.npz_headers(self._path(name))
            return array_files.load_npz(self._path(name), headers)
        except checks.InputError:
            return {}
