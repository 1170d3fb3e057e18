"""Exports as results: a part of a selection in one form."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.selection import Cell
from dlc_jax.types import Selection
from dlc_jax.workspace import Written, artefacts, records


@dataclasses.dataclass(frozen=True, eq=False)
class ExportStep:
    """One part of a selection in one form, below `exports/`.

    Attributes:
      name: Path of the file or folder below the work directory.
      is_folder: Whether it is a folder.
      key: Data, selection, form and part that it is made from.
      put: Writes it, whole or not at all.
    """

    name: str
    is_folder: bool
    key: Mapping[str, Any]
    put: Callable[[Path], Any]

    kind = "export"
    stage = "export"
    obsolete = ()

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.is_folder else (self.name,)

    @property
    def settings(self) -> dict[str, Any]:
        return {"form": self.key["form"]}

    def compute(self, scratch: Path) -> None:
        """Nothing: what is exported is on disk."""

    def write(self, root: Path, _: None) -> Written:
        self.put(root / self.name)
        if not self.is_folder:
            return Written(self.files)
        return Written(f"{self.name}/{name}" for name in artefacts.names_below(root / self.name))


@runtime_checkable
class Writer(Protocol):
    """How a part of a selection is written."""

    def __call__(self, kept: Selection, part: str, /) -> Callable[[str, Path], Any]:
        """Returns what writes the part in a form, whole or not at all; ValueError if empty."""
        ...


def export_steps(
    config: Config, root: Path, kept: Mapping[Cell, Selection], data: str, writer: Writer
) -> Iterator[ExportStep]:
    """Yields `exports/<method>/<cell>/<part><suffix>` for every form with a suffix.

    Args:
      config: Forms and parts.
      root: Work directory.
      kept: Selections to write.
      data: Identity of the data that are written.
      writer: How each part is written.
    """
    for cell, selection in kept.items():
        made_from = _made_from(root, cell)
        for part in config.export.parts:
            write = writer(selection, part)
            for form in config.export.forms:
                if (written := config.data_kind.forms[form]) is None:
                    continue
                path = f"{artefacts.EXPORTS}/{cell.name}/{part}{written.suffix}"
                key = {"form": form, "part": part, "dataset": data, **made_from}
                is_folder = not written.suffix.startswith(".")
                yield ExportStep(path, is_folder, key, functools.partial(write, form))


def _made_from(root: Path, cell: Cell) -> dict[str, Any]:
    """Returns what decides a selection that is there, and the SHA-256 of its positions."""
    selection = records.read(root, f"{artefacts.SELECTIONS}/{cell.name}")
    assert selection is not None  # it was read
    (positions,) = (name for name in selection.outputs if name.endswith(".npy"))
    return {"selection": selection.key, "kept": selection.outputs[positions]}


def check_can_be_written(config: Config, root: Path) -> None:
    """Raises ValueError for a form that the work directory cannot hold."""
    if "image_links" in config.export.forms and artefacts.is_mirrored(root):
        raise checks.InputError(
            "export.forms: a bucket cannot hold image_links; expected image_folder, or a --workdir "
            "that is no bucket."
        )
    for form in config.export.forms:
        if (written := config.data_kind.forms[form]) is None:
            continue
        for cell in config.selection.cells():
            for part in config.export.parts:
                path = root / artefacts.EXPORTS / cell.name / f"{part}{written.suffix}"
                check_path(path, root, is_folder=not written.suffix.startswith("."))


def check_path(path: Path, workdir: Path, *, is_folder: bool) -> None:
    """Raises where something in the work directory is in the way of a file or folder."""
    there = next(parent for parent in path.parents if parent.exists() or parent == workdir)
    if there.exists() and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise checks.InputError(f"{there}: {what}; {path.name} is to be written there.")
    if not is_folder and path.is_dir() and not path.is_symlink():
        raise checks.InputError(f"{path}: is a folder; expected a file or nothing there.")
