"""The stage `export`: every selected cell in the forms asked for, below `exports/`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.exports import EXPORTS, PARTS, RELEASED, export, part_positions
from dlc_jax.exports.instructions import INSTRUCTION_EXPORTS
from dlc_jax.exports.released import (
    check_names_match,
    match_samples,
    needs_grid,
    released_path,
)
from dlc_jax.masking import PathSpec
from dlc_jax.selection import AUTO, Cell
from dlc_jax.stages.job import Job
from dlc_jax.stages.score_instructions import load_configured_instructions
from dlc_jax.stages.selection_files import FOLDER, files_of, read_selection
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.what_was_scored import check_is_what_was_scored
from dlc_jax.types import Dataset
from dlc_jax.workspace import Workspace, Written, artefacts, keys, records

# What names in the released layout are made of.
_SETTINGS = {
    "encoder": {"name": str},
    "probe": {"masking": str, "step": float, "placement": str, "num_probes": (int, str)},
}
_RELEASED_ROOTS = {"kept": "idxs", "dropped": "idxs-dropped"}  # for the released --idxs_dir


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


def run(job: Job) -> None:
    """Writes the exports, in the first process."""

    def export_all(known: SelectionInputs) -> None:
        config, workspace = job.config, job.workspace
        if config.is_of_instructions:
            run_exports_instructions(config, workspace, known)
        else:
            run_exports(config, workspace, known, job.load(config.dataset.train))

    job.with_scores(export_all)


def run_exports(
    config: Config, workspace: Workspace, known: SelectionInputs, dataset: Dataset
) -> None:
    """Writes `exports/<method>/<cell>/<part><suffix>`, each whole or not there at all.

    The form `released` goes to `exports/idxs/` and `exports/idxs-dropped/`, in that code's layout.

    Raises:
      ValueError: data that are not those that were scored, a selection that is not there, a sample
        that cannot be read; with `released` what `released_path` and `match_samples` refuse.
    """
    root = workspace.root
    check_is_what_was_scored(root, dataset)
    cells, parts = config.selection.cells(), config.export.parts
    released: dict[tuple[Cell, str], Path] = {}
    if RELEASED in config.export.forms:
        released = _released_paths(config, root, *_made_with(root))
    steps: list[ExportStep] = []
    positions: dict[str, np.ndarray] = {}
    for cell in cells:
        kept = read_selection(workspace, known, cell)
        kept = dataclasses.replace(kept, scored_ids=known.samples.ids)
        for form in config.export.forms:
            for part in parts:
                if form == RELEASED:
                    path = released[cell, part].relative_to(root).as_posix()
                    positions[path] = part_positions(dataset, kept, part, str(root / path))
                    continue
                suffix = EXPORTS[form].suffix
                path = f"{artefacts.EXPORTS}/{cell.name}/{part}{suffix}"
                put = functools.partial(export, dataset, kept, form=form, part=part, overwrite=True)
                source = _source(root, cell, form, part, f"{dataset.name} {dataset.fingerprint}")
                steps.append(ExportStep(path, not suffix.startswith("."), source, put))
    for path, some in _in_released_order(config, dataset, positions).items():
        source = {"form": RELEASED, "positions": keys.json_hash(some.tolist())}
        steps.append(ExportStep(path, False, source, functools.partial(_write_positions, some)))
    _export(workspace, steps, len(cells))


def run_exports_instructions(config: Config, workspace: Workspace, known: SelectionInputs) -> None:
    """Writes `exports/<method>/<cell>/<part>.<form>`: rows with all their original fields.

    Raises:
      ValueError: data that are not those that were scored, a selection that is not there.
    """
    data = load_configured_instructions(config, config.dataset.train)
    root = workspace.root
    check_is_what_was_scored(root, data)
    # the fingerprint is of what is trained on; these have other fields, in an order, as well
    rows = keys.json_hash([json.dumps(row, default=str) for row in data.rows])
    data = data.subset(np.flatnonzero(np.isin(data.ids, known.samples.ids)))  # others are neither
    cells, steps = config.selection.cells(), []
    for cell in cells:
        kept = read_selection(workspace, known, cell)
        assert kept.ids is not None  # it was read with them
        is_kept = np.isin(data.ids, kept.ids)
        parts = {"kept": is_kept, "dropped": ~is_kept}
        for part in config.export.parts:
            if not parts[part].any():
                raise checks.InputError(
                    f"{cell.name}: nothing is {part}, so there is nothing to write."
                )
            some = np.flatnonzero(parts[part])
            for form in config.export.forms:
                suffix = INSTRUCTION_EXPORTS[form].suffix
                path = f"{artefacts.EXPORTS}/{cell.name}/{part}{suffix}"
                put = functools.partial(_write_rows, data, some, form)
                source = _source(root, cell, form, part, rows)
                steps.append(ExportStep(path, False, source, put))
    _export(workspace, steps, len(cells))


def _write_rows(data: Instructions, positions: np.ndarray, form: str, path: Path) -> None:
    INSTRUCTION_EXPORTS[form].write(data.subset(positions), path)


def _export(workspace: Workspace, steps: list[ExportStep], num_cells: int) -> None:
    made = [step for step in steps if workspace.ensure(step) is not None]
    if made:
        workspace.say(f"export: {len(made)} exports of {num_cells} selections written")
    else:
        workspace.say("export: unchanged, not written again")
    workspace.say(f"files: {workspace.root / artefacts.EXPORTS}/")


def _source(root: Path, cell: Cell, form: str, part: str, data: str) -> dict[str, Any]:
    """Returns what decides an export of a selection that is there."""
    positions = files_of(cell)[0].as_posix()
    selection = records.read(root, f"{FOLDER}/{cell.name}")
    assert selection is not None  # it was read
    made_from = {"selection": selection.key, "kept": selection.outputs[positions]}
    return {"form": form, "part": part, "dataset": data, **made_from}


def check_takes_forms(config: Config, workdir: Path) -> None:
    """Raises for a form that the work directory cannot hold, before a scoring pass is spent."""
    if "export" not in config.stages:
        return
    if "image_links" in config.export.forms and artefacts.is_mirrored(workdir):
        raise checks.InputError(
            "export.forms: a bucket cannot hold image_links; expected image_folder, or a --workdir "
            "that is no bucket."
        )
    forms = INSTRUCTION_EXPORTS if config.is_of_instructions else EXPORTS
    for cell in config.selection.cells():
        for part in config.export.parts:
            for form in config.export.forms:
                if form != RELEASED:
                    suffix = forms[form].suffix
                    path = workdir / artefacts.EXPORTS / cell.name / f"{part}{suffix}"
                    _check_can_be_written(path, workdir, is_folder=not suffix.startswith("."))


def check_has_forms(config: Config, workdir: Path, dataset: Dataset) -> None:
    """Raises for a form that the data set cannot be written in, before a scoring pass is spent."""
    forms = config.export.forms
    for check in dict.fromkeys(EXPORTS[form].check for form in forms if form in EXPORTS):
        if check is not None:
            check(dataset, "export.forms")
    if RELEASED in forms:
        made_with, num_probes = config.to_dict(), 1  # how many there will be is nothing to refuse
        if "score" not in config.stages:
            made_with, num_probes = _made_with(workdir)
        for path in _released_paths(config, workdir, made_with, num_probes).values():
            _check_can_be_written(path, workdir, is_folder=False)
        where, name = str(config.export.datasets_dir), str(config.export.released_name)
        every = set(config.export.parts) == set(PARTS) and config.dataset.on_corrupt == "error"
        check_names_match(dataset, where, name, all_of_them=every)


def check_has_forms_instructions(config: Config) -> None:
    """Raises for a form that cannot hold the rows, before a scoring pass is spent."""
    data = load_configured_instructions(config, config.dataset.train)
    for form in config.export.forms:
        INSTRUCTION_EXPORTS[form].check(data)


def _check_can_be_written(path: Path, workdir: Path, *, is_folder: bool) -> None:
    """Raises where something in the work directory is in the way of a file or folder."""
    there = next(parent for parent in path.parents if parent.exists() or parent == workdir)
    if there.exists() and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise checks.InputError(f"{there}: {what}; {path.name} is to be written there.")
    if not is_folder and path.is_dir() and not path.is_symlink():
        raise checks.InputError(f"{path}: is a folder; expected a file or nothing there.")


def _made_with(workdir: Path) -> tuple[dict[str, Any], int]:
    """Returns the settings that the scores were made with, and how many probes there were."""
    made_with = records.settings_of(workdir, "score", _SETTINGS)
    if made_with is None:
        raise checks.InputError(
            f"{workdir / records.file_of('score')}: not there, which says with what the scores "
            f"were made; the form {RELEASED!r} names its files by that. Run the stage 'score'."
        )
    return made_with, _num_probes(workdir)


def _released_paths(
    config: Config, workdir: Path, made_with: dict[str, Any], num_probes: int
) -> dict[tuple[Cell, str], Path]:
    """Returns where every cell and part goes; the names are of the scores.

    Raises:
      ValueError: settings that the released layout has no name for.
    """
    probe = made_with["probe"]
    path = PathSpec(masking=probe["masking"], step=probe["step"], num_probes=num_probes)
    paths: dict[tuple[Cell, str], Path] = {}
    for cell in config.selection.cells():
        if AUTO in (cell.method, cell.split):
            raise checks.InputError(
                f"export.forms: the released layout has no name for {AUTO!r}; expected a method "
                "and a split, such as those that selections/ says it stood for."
            )
        if needs_grid(cell.method):
            _check_placement(probe)
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


def _num_probes(workdir: Path) -> int:
    """Returns how many there were: `probe.max_sparsity` may have cut the path short."""
    return len(artefacts.read_losses(workdir)["sparsity"])


def _check_placement(probe: dict[str, Any]) -> None:
    if probe["placement"] != "grid" or probe["num_probes"] == "auto":
        raise checks.InputError(
            f"probe.placement: the scores were made with {probe['placement']!r}, for which the "
            "released layout has no name; expected 'grid', the first probes of the path."
        )


def _in_released_order(
    config: Config, dataset: Dataset, positions: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns positions in the released order; every sample is looked up and compared once."""
    if not positions:
        return {}
    samples = np.unique(np.concatenate(list(positions.values())))
    order = np.full(len(dataset), -1, np.int64)
    order[samples] = match_samples(
        dataset, samples, str(config.export.datasets_dir), str(config.export.released_name)
    )
    return {path: np.sort(order[some]) for path, some in positions.items()}


def _write_positions(positions: np.ndarray, path: Path) -> None:
    with artefacts.atomic(path) as file:
        np.save(file, positions)
