"""Exports in the layout of the released code, whose paths name how the scores were made."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.exports import PARTS, RELEASED, part_positions
from dlc_jax.exports.released import (
    check_names_match,
    match_samples,
    needs_grid,
    released_path,
)
from dlc_jax.masking import PathSpec
from dlc_jax.selection import AUTO, Cell
from dlc_jax.tasks.export_step import ExportStep, check_path
from dlc_jax.types import Dataset, Selection
from dlc_jax.workspace import artefacts, keys, records

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
    check_names_match(dataset, *_place(config), all_of_them=every)


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
    order[samples] = match_samples(dataset, samples, *_place(config))  # each is looked up once
    for name, some in positions.items():
        there = np.sort(order[some])
        key = {"form": RELEASED, "positions": keys.json_hash(there.tolist())}
        yield ExportStep(name, key, functools.partial(_write_positions, there))


def _place(config: Config) -> tuple[str, str]:
    """Returns the folder of the released code's data sets, and the name of this one there."""
    return str(config.export.datasets_dir), str(config.export.released_name)


def _made_with(workdir: Path) -> tuple[dict[str, Any], int]:
    """Returns the settings that the scores were made with, and how many probes there were."""
    made_with = records.settings_of(workdir, "score", _SETTINGS)
    if made_with is None:
        raise checks.InputError(
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
            raise checks.InputError(
                f"export.forms: the released layout has no name for {AUTO!r}; expected a method "
                "and a split, such as those that selections/ says it stood for."
            )
        if needs_grid(cell.method) and not is_grid:
            raise checks.InputError(
                f"probe.placement: the scores were made with {probe['placement']!r}, for which the "
                "released layout has no name; expected 'grid', the first probes of the path."
            )
        for part in config.export.parts:
            paths[cell, part] = released_path(
                workdir / artefacts.EXPORTS / _RELEASED_ROOTS[part],
                cell,
                path,
                name=str(config.export.released_name),
                pretrain=config.export.pretrain,
                arch=made_with["encoder"]["name"],
            )
    if len(set(paths.values())) < len(paths):  # 0.3 and 0.1 + 0.2 are two splits here
        raise checks.InputError(
            f"selection: two cells have one name in the released layout: {config.selection}."
        )
    return paths


def _write_positions(positions: np.ndarray, path: Path) -> None:
    with artefacts.atomic(path) as file:
        np.save(file, positions)
