"""The runs of a sweep: one for every selected cell and for the full set, sharing programs."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.distributed import positions_from_first, processes, said_of, stopping
from dlc_jax.selection import FULL, Cell
from dlc_jax.stages.selection_files import read_selection
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.sweep_results import read_run, read_runs, run_folder, write_results
from dlc_jax.tasks.measurements import check_is_what_was_scored
from dlc_jax.tasks.task import Training
from dlc_jax.training.folder import ERROR
from dlc_jax.training.loop import Trainer
from dlc_jax.training.run_step import RunStep
from dlc_jax.types import Selection
from dlc_jax.workspace import Workspace, artefacts, records
from dlc_jax.workspace.keys import json_hash


class SweepEnd(NamedTuple):
    """How a sweep ended.

    Attributes:
      failures: A line for every run that failed; the others are not touched by it.
      seconds: Time of all finished runs, whenever they ran.
    """

    failures: list[str]
    seconds: float


def run_sweep(
    config: Config,
    workspace: Workspace,
    inputs: SelectionInputs | None,
    training: Training,
) -> SweepEnd:
    """Runs what is not finished yet, and rewrites `results.csv` after every run.

    Args:
      config: Checked configuration.
      workspace: Where scores and selections are.
      inputs: What was scored, and what the methods use; None in processes other than the first.
      training: What to train, and on what.
    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        that does not fit; or every run failed.
    """
    workdir, echo = workspace
    workspace.alone(lambda: check_is_what_was_scored(workdir, training.data))
    trainer = training.make_trainer()
    sweep = _Sweep(config, workspace, inputs, trainer)
    workspace.alone(sweep.make_room)
    # a table of runs set aside would be taken for this sweep's
    workspace.alone(lambda: write_results(workdir))
    cells = config.runs()
    echo(f"finetune: {len(cells)} runs on {said_of(config.mesh.make())}")
    for note in trainer.notes:
        echo(visible(f"finetune: {note}"))
    failures = sweep.run_all(cells)
    if len(failures) == len(cells):
        raise checks.SharedError(f"all {len(cells)} runs failed, first {failures[0]}")
    seconds = workspace.broadcast(
        lambda: float(sum(row["seconds"] for row in write_results(workdir)))
    )
    return SweepEnd(failures, seconds)


class _Sweep(NamedTuple):
    """What the runs of a sweep share."""

    config: Config
    workspace: Workspace
    inputs: SelectionInputs | None
    trainer: Trainer[Any]

    @property
    def workdir(self) -> Path:
        return self.workspace.root

    @property
    def shared(self) -> dict[str, str]:
        """What its runs have in common."""
        assert self.inputs is not None
        return {"shared": self.trainer.fingerprint, "scores": self.inputs.samples.fingerprint}

    def step(self, cell: Cell, positions: Int64[np.ndarray, " k"]) -> RunStep:
        """Returns the run of a cell; other processes than the first know less of it."""
        facts: dict[str, Any] = {"cell": cell._asdict()}
        if self.inputs is not None:
            facts["scores"] = self.inputs.samples.fingerprint
        return RunStep(
            self.trainer,
            positions,
            cell.seed,
            run_folder(self.workdir, cell),
            facts=facts,
            settings=dataclasses.asdict(self.config.training),
            say=self.of(cell).say,
        )

    def of(self, cell: Cell) -> Workspace:
        """Returns the work directory of a run."""
        echo = self.workspace.say
        return Workspace(run_folder(self.workdir, cell), lambda line: echo(f"finetune: {line}"))

    def run_all(self, cells: list[Cell]) -> list[str]:
        """Runs one after the other; returns a line for every one that failed."""
        failures, num_done, echo = [], 0, self.workspace.say
        for number, cell in enumerate(cells, start=1):
            place = f"finetune: {number}/{len(cells)} {cell.name}"
            try:
                said = self.run(cell)
                if said is not None:
                    self.workspace.alone(lambda: write_results(self.workdir))
            except Exception as error:  # whatever it is, the other runs go on
                if processes.count() > 1 and not isinstance(error, checks.SharedError):
                    raise  # unless other processes know nothing of it, and wait for this one
                reason = _reason(error, self.of(cell))
                failures.append(f"{cell.name}: {reason}")
                echo(visible(f"{place}: failed: {reason}"))
                continue
            if said is None:
                num_done += 1
            else:
                echo(visible(f"{place}: {said}"))
        if num_done:
            echo(f"finetune: {num_done} runs were finished before, not run again")
        return failures

    def run(self, cell: Cell) -> str | None:
        """Returns what to say of the run; None if it was finished before."""
        stopping.check()
        mine = self.workspace.alone(lambda: self._make_room_for(cell))
        positions = positions_from_first(mine)
        step, workspace = self.step(cell, positions), self.of(cell)
        made = workspace.ensure(step)
        workspace.alone(lambda: self.trainer.complete(workspace))
        return None if made is None else self.trainer.said(made.value)

    def _make_room_for(self, cell: Cell) -> Int64[np.ndarray, " k"]:
        """Returns what the run trains on, once a run on other samples is out of its folder."""
        positions = self.trainer.positions(self._kept(cell))
        step, there = self.step(cell, positions), read_run(self.workdir, cell)
        folder, group = f"{artefacts.FINETUNE}/{cell.name}", f"{artefacts.FINETUNE}-"
        if there is not None and there.difference(step):
            self.workspace.set_run_aside(folder, group + there.identity[:12])
        self.workspace.take_runs_back(folder, group + records.identity_of(step)[:12])
        return positions

    def _kept(self, cell: Cell) -> Selection:
        assert self.inputs is not None
        samples, mode = self.inputs.samples, self.config.mode
        if cell.method != FULL:
            return read_selection(self.workspace, self.inputs, cell)
        return Selection(
            indices=np.arange(len(samples.ids)),
            **cell._asdict(),
            mode=mode,
            num_kept_per_class=np.bincount(samples.labels, minlength=len(samples.class_names)),
            ids=samples.ids,
        )

    def make_room(self) -> None:
        """Moves runs of other settings or scores to `superseded/`, and those of these back."""
        num_moved, echo = 0, self.workspace.say
        runs, unreadable = read_runs(self.workdir)
        for name, record in sorted(runs.items()):
            shared = {part: (record.key | record.facts).get(part) for part in self.shared}
            if shared != self.shared:
                self.workspace.set_run_aside(f"{artefacts.FINETUNE}/{name}", _group(shared))
                num_moved += 1
        for reason in unreadable.values():
            echo(f"finetune: note: a run is left out of {artefacts.RESULTS}: {reason}")
        if num_moved:
            echo(f"finetune: {num_moved} runs of other settings or scores moved to superseded/")
        self.workspace.take_runs_back(f"{artefacts.FINETUNE}/*/*", _group(self.shared))


def _group(shared: Mapping[str, Any]) -> str:
    return f"{artefacts.FINETUNE}-{json_hash(shared)[:12]}"


def _reason(error: Exception, workspace: Workspace) -> str:
    if isinstance(error, (checks.InputError, OSError)):
        return str(error)
    with contextlib.suppress(OSError):  # a full disk must not end the sweep
        lines = traceback.format_exception(error)
        if workspace.write_text(ERROR, "".join(lines)):
            return f"{checks.first_line(error)} (all of it in {workspace.root / ERROR})"
    return checks.first_line(error)
