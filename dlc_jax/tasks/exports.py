"""Exports as results: a part of a selection in one form, and the layout of the released code."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.exports import PARTS, RELEASED, part_positions, released
from dlc_jax.masking import PathSpec
from dlc_jax.selection import AUTO, Cell
from dlc_jax.types import Dataset, Selection
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
        raise expect.InputError(
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
        raise expect.InputError(f"{there}: {what}; {path.name} is to be written there.")
    if not _is_folder(path) and path.is_dir() and not path.is_symlink():
        raise expect.InputError(f"{path}: is a folder; expected a file or nothing there.")


def _is_folder(path: str | Path) -> bool:
    return not Path(path).suffix


# What names in the released layout are made of.
_SETTINGS = {
    "encoder": {"name": str},
    "probe": {"masking": str, "step": float, "placement": str, "num_probes": (int, str)},
}
_RELEASED_ROOTS = {"kept": "idxs", "dropped": "idxs-dropped"}  # for the released --idxs_dir


def check_released(config: Config, root: Path, dataset: Dataset) -> None:
    """Raises ValueError where the layout has no name for something, or a path cannot be written."""
    made_with, num_probes = config.to_dict(), 1  # how many there will be is nothing to refuse
    if "score" not in config.stages:
        made_with, num_probes = _made_with(root)
    for path in _paths(config, root, made_with, num_probes).values():
        check_path(path, root)
    every = set(config.export.parts) == set(PARTS) and config.dataset.on_corrupt == "error"
    released.check_names_match(dataset, *_place(config), all_of_them=every)


def released_steps(
    config: Config, root: Path, kept: Mapping[Cell, Selection], dataset: Dataset
) -> Iterator[ExportStep]:
    """Yields `exports/idxs/` and `exports/idxs-dropped/`, positions in the released order.

    Raises:
      ValueError: what `released_path` and `match_samples` refuse.
    """
    positions = {}
    for (cell, part), path in _paths(config, root, *_made_with(root)).items():
        name = path.relative_to(root).as_posix()
        _, positions[name] = part_positions(dataset, kept[cell], part, str(path))
    samples = np.unique(np.concatenate(list(positions.values())))
    order = np.full(len(dataset), -1, np.int64)
    # each is looked up once
    order[samples] = released.match_samples(dataset, samples, *_place(config))
    for name, some in positions.items():
        there = np.sort(order[some])
        key = {"form": RELEASED, "positions": artefacts.json_hash(there.tolist())}
        yield ExportStep(name, key, functools.partial(_write_positions, there))


def _place(config: Config) -> tuple[str, str]:
    """Returns the folder of the released code's data sets, and the name of this one there."""
    return str(config.export.datasets_dir), str(config.export.released_name)


def _made_with(workdir: Path) -> tuple[dict[str, Any], int]:
    """Returns the settings that the scores were made with, and how many probes there were."""
    made_with = records.settings_of(workdir, "score", _SETTINGS)
    if made_with is None:
        raise expect.InputError(
            f"{workdir / records.file_of('score')}: not there, which says with what the scores "
            f"were made; the form {RELEASED!r} names its files by that. Run the stage 'score'."
        )
    # `probe.max_sparsity` may have cut the path short
    return made_with, len(artefacts.read_losses(workdir)["sparsity"])


def _paths(
    config: Config, workdir: Path, made_with: dict[str, Any], num_probes: int
) -> dict[tuple[Cell, str], Path]:
    """Returns where every cell and part goes; the names are of the scores.

    Raises:
      ValueError: settings that the released layout has no name for.
    """
    probe = made_with["probe"]
    path = PathSpec(masking=probe["masking"], step=probe["step"], num_probes=num_probes)
    is_grid = probe["placement"] == "grid" and probe["num_probes"] != AUTO
    paths: dict[tuple[Cell, str], Path] = {}
    for cell in config.selection.cells():
        if AUTO in (cell.method, cell.split):
            raise expect.InputError(
                f"export.forms: the released layout has no name for {AUTO!r}; expected a method "
                "and a split, such as those that selections/ says it stood for."
            )
        if released.needs_grid(cell.method) and not is_grid:
            raise expect.InputError(
                f"probe.placement: the scores were made with {probe['placement']!r}, for which the "
                "released layout has no name; expected 'grid', the first probes of the path."
            )
        for part in config.export.parts:
            paths[cell, part] = released.released_path(
                workdir / artefacts.EXPORTS / _RELEASED_ROOTS[part],
                cell,
                path,
                name=str(config.export.released_name),
                pretrain=config.export.pretrain,
                arch=made_with["encoder"]["name"] or "encoder",  # before it is scored
            )
    if len(set(paths.values())) < len(paths):  # 0.3 and 0.1 + 0.2 are two splits here
        raise expect.InputError(
            f"selection: two cells have one name in the released layout: {config.selection}."
        )
    return paths


def _write_positions(positions: np.ndarray, path: Path) -> None:
    with artefacts.atomic(path) as file:
        np.save(file, positions)
