"""Where and on what a call runs, apart from what it computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from dlc_jax import checks
from dlc_jax.distributed import processes


def hides_bar(progress: bool) -> bool | None:
    """Returns tqdm's `disable`: the first process shows a bar, if asked for."""
    return None if progress and processes.is_first() else True


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a call keeps its work, on which devices it runs, and whether it shows bars.

    Attributes:
      folder: The same call resumes from what is finished there, on other devices too. For probes
        it is scratch, yours to remove afterwards, and processes of `jax.distributed` that are given
        the same mesh and folder share the work; training also leaves its result there. None:
        nowhere.
      mesh: Devices, from `make_mesh`: batches are divided among its axis `data`, probes among
        `probe`. Losses of probes are the same on any mesh, training is so to rounding. None: the
        default device.
      progress: Whether to show bars on the terminal, of the first process where there are more.
    Raises:
      ValueError: a folder that is no path, or a mesh that is none.

    Example: `dlc.probe(encoder, dataset, run=dlc.Run(folder="runs/mine", progress=True))`.
    """

    folder: str | Path | None = None
    mesh: Mesh | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, kinds, expected in (
            ("folder", self.folder, (str, Path), "a path"),
            ("mesh", self.mesh, (Mesh,), "what dlc.make_mesh(...) gives"),
        ):
            if value is not None and not isinstance(value, kinds):
                found = checks.shortened(repr(value))
                raise checks.InputError(f"run.{name}: expected {expected} or None, got {found}.")

    @property
    def path(self) -> Path | None:
        """The folder as a path."""
        return None if self.folder is None else Path(self.folder)
