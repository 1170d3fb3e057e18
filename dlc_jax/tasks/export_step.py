"""Exports as results: a part of a selection in one form."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.selection import Cell
from dlc_jax.types import Selection
from dlc_jax.workspace import Written, artefacts, records

# Returns what writes a part of a selection in a form, whole or not at all; ValueError if empty.
Writer: TypeAlias = Callable[[Selection, str], Callable[[str, Path], Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class ExportStep:
    """One part of a selection in one form, below `exports/`.

    Attributes:
      name: Path below the work directory; a file has a suffix, a folder has none.
      key: Data, selection, form and part that it is made from.
      put: Writes it, whole or not at all.
    """

    name: str
    key: Mapping[str, Any]
    put: Callable[[Path], Any]

    kind = stage = "export"
    obsolete = ()

    @property
    def files(self) -> tuple[str, ...]:
        return () if _is_folder(self.name) else (self.name,)

    @property
    def settings(self) -> dict[str, Any]:
        return {"form": self.key["form"]}

    def compute(self, scratch: Path) -> None:
        """Nothing: what is exported is on disk."""

    def write(self, root: Path, _: None) -> Written:
        self.put(root / self.name)
        below = [f"{self.name}/{name}" for name in artefacts.names_below(root / self.name)]
        return Written(self.files or below)


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
        record = records.read(root, f"{artefacts.SELECTIONS}/{cell.name}")
        assert record is not None  # it was read
        (positions,) = (name for name in record.outputs if name.endswith(".npy"))
        made_from = {"selection": record.key, "kept": record.outputs[positions]}
        for part in config.export.parts:
            write = writer(selection, part)
            for form in config.export.forms:
                key = {"form": form, "part": part, "dataset": data, **made_from}
                if path := _path(config, cell, part, form):
                    yield ExportStep(path, key, functools.partial(write, form))


def _path(config: Config, cell: Cell, part: str, form: str) -> str | None:
    """Returns where a part goes, below the work directory; None: the form chooses its paths."""
    written = config.data_kind.forms[form]
    return None if written is None else f"{artefacts.EXPORTS}/{cell.name}/{part}{written.suffix}"


def check_can_be_written(config: Config, root: Path) -> None:
    """Raises ValueError for a form that the work directory cannot hold."""
    if "image_links" in config.export.forms and artefacts.is_mirrored(root):
        raise checks.InputError(
            "export.forms: a bucket cannot hold image_links; expected image_folder, or a --workdir "
            "that is no bucket."
        )
    for form, cell, part in itertools.product(
        config.export.forms, config.selection.cells(), config.export.parts
    ):
        if path := _path(config, cell, part, form):
            check_path(root / path, root)


def check_path(path: Path, workdir: Path) -> None:
    """Raises where something in the work directory is in the way of a file or folder."""
    there = next(parent for parent in path.parents if parent.exists() or parent == workdir)
    if there.exists() and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise checks.InputError(f"{there}: {what}; {path.name} is to be written there.")
    if not _is_folder(path) and path.is_dir() and not path.is_symlink():
        raise checks.InputError(f"{path}: is a folder; expected a file or nothing there.")


def _is_folder(path: str | Path) -> bool:
    return not Path(path).suffix
