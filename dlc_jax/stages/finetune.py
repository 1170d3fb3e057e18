"""The stage `finetune`: a run per selected cell and one on everything, sharing programs."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.distributed import positions_from_first, processes, said_of
from dlc_jax.selection import FULL, Cell
from dlc_jax.stages.select import Job, read_selection
from dlc_jax.stages.sweep_results import BASE_CELL, read_run, read_runs, run_folder, write_results
from dlc_jax.tasks.measurements import check_is_what_was_scored
from dlc_jax.training.loop import ERROR, RunStep, Trainer
from dlc_jax.types import Selection
from dlc_jax.workspace import Workspace, artefacts, records


class Sweep(NamedTuple):
    """The runs of a job, by one trainer."""

    job: Job
    trainer: Trainer[Any]

    def make_room(self) -> None:
        """Moves runs of other settings or scores to `superseded/`, and those of these back."""
        workspace, num_moved = self.job.workspace, 0
        ours = {"shared": self.trainer.fingerprint, "scores": self.job.scored.samples.fingerprint}
        runs, unreadable = read_runs(workspace.root)
        for name, record in sorted(runs.items()):
            theirs = {part: (record.key | record.facts).get(part) for part in ours}
            if theirs != ours:
                workspace.set_run_aside(f"{artefacts.FINETUNE}/{name}", _group(theirs))
                num_moved += 1
        for reason in unreadable.values():
            workspace.say(f"finetune: note: a run is left out of {artefacts.RESULTS}: {reason}")
        if num_moved:
            workspace.say(
                f"finetune: {num_moved} runs of other settings or scores moved to superseded/"
            )
        workspace.take_runs_back(f"{artefacts.FINETUNE}/*/*", _group(ours))
        # a table of runs set aside would be taken for this sweep's
        write_results(workspace.root)

    def run_all(self, cells: list[Cell]) -> list[str]:
        """Runs one after the other; returns a line for every one that failed."""
        failures, num_done, workspace = [], 0, self.job.workspace
        for number, cell in enumerate(cells, start=1):
            place = f"finetune: {number}/{len(cells)} {cell.name}"
            try:
                said = self._run(cell)
                if said is not None:
                    workspace.alone(lambda: write_results(workspace.root))
            except Exception as error:  # whatever it is, the other runs go on
                if processes.count() > 1 and not isinstance(error, expect.SharedError):
                    raise  # unless other processes know nothing of it, and wait for this one
                reason = _reason(error, self._folder(cell))
                failures.append(f"{cell.name}: {reason}")
                said = f"failed: {reason}"
            if said is None:
                num_done += 1
            else:
                workspace.say(expect.visible(f"{place}: {said}"))
        if num_done:
            workspace.say(f"finetune: {num_done} runs were finished before, not run again")
        return failures

    def _run(self, cell: Cell) -> str | None:
        """Returns what to say of the run; None if it was finished before."""
        processes.stop_if_asked()
        mine = self.job.workspace.alone(lambda: self._make_room_for(cell))
        step, workspace = self._step(cell, positions_from_first(mine)), self._folder(cell)
        made = workspace.ensure(step)
        workspace.alone(lambda: self.trainer.complete(workspace))
        return None if made is None else self.trainer.said(made.value)

    def _folder(self, cell: Cell) -> Workspace:
        """Returns the work directory of a run."""
        root, echo = self.job.workspace
        return Workspace(run_folder(root, cell), lambda line: echo(f"finetune: {line}"))

    def _step(self, cell: Cell, positions: Int64[np.ndarray, " k"]) -> RunStep:
        """Returns the run of a cell; other processes than the first know less of it."""
        facts: dict[str, Any] = {"cell": cell._asdict()}
        if self.job.inputs is not None:
            facts["scores"] = self.job.inputs.samples.fingerprint
        settings, (folder, say) = dataclasses.asdict(self.job.config.training), self._folder(cell)
        return RunStep(self.trainer, positions, cell.seed, folder, facts, settings, say)

    def _make_room_for(self, cell: Cell) -> Int64[np.ndarray, " k"]:
        """Returns what the run trains on, once a run on other samples is out of its folder."""
        workspace = self.job.workspace
        positions = self.trainer.positions(self._kept(cell))
        step, there = self._step(cell, positions), read_run(workspace.root, cell.name)
        folder, group = f"{artefacts.FINETUNE}/{cell.name}", f"{artefacts.FINETUNE}-"
        if there is not None and there.difference(step):
            workspace.set_run_aside(folder, group + there.identity[:12])
        workspace.take_runs_back(folder, group + records.identity_of(step)[:12])
        return positions

    def _kept(self, cell: Cell) -> Selection:
        samples = self.job.scored.samples
        if cell.method != FULL:
            return read_selection(self.job.workspace, self.job.scored, cell)
        every, mode = np.arange(len(samples.ids)), self.job.config.mode
        sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
        return Selection(every, *cell, mode=mode, num_kept_per_class=sizes, ids=samples.ids)


def _group(shared: Mapping[str, Any]) -> str:
    return f"{artefacts.FINETUNE}-{artefacts.json_hash(shared)[:12]}"


def _reason(error: Exception, workspace: Workspace) -> str:
    if isinstance(error, (expect.InputError, OSError)):
        return str(error)
    with contextlib.suppress(OSError):  # a full disk must not end the sweep
        lines = traceback.format_exception(error)
        if workspace.write_text(ERROR, "".join(lines)):
            return f"{expect.first_line(error)} (all of it in {workspace.root / ERROR})"
    return expect.first_line(error)


def run(job: Job) -> None:
    """Fine-tunes on every cell; adds a line to `job.failures` for each run that fails.

    Runs what is not finished yet. Leaves `finetune/<method>/<cell>/`, and rewrites `results.csv`
    after every run.

    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        that does not fit; or every run failed.
    """
    config, workspace = job.config, job.workspace
    workdir, echo = workspace
    training = job.task.training(workspace)

    def prepare() -> None:
        """Sets aside the answers of another model before it was fine-tuned; checks the data."""
        record = records.read(workdir, f"{artefacts.EVALUATE}/{BASE_CELL.name}")
        if record is not None and record.key.get("run") != training.fingerprint:
            workspace.set_aside(record)
        check_is_what_was_scored(workdir, training.data)

    workspace.alone(prepare)
    sweep = Sweep(job, training.make_trainer())
    workspace.alone(sweep.make_room)
    cells = config.runs()
    echo(f"finetune: {len(cells)} runs on {said_of(config.mesh.make())}")
    for note in sweep.trainer.notes:
        echo(expect.visible(f"finetune: {note}"))
    failures = sweep.run_all(cells)
    if len(failures) == len(cells):
        raise expect.SharedError(f"all {len(cells)} runs failed, first {failures[0]}")
    seconds = workspace.broadcast(  # of all finished runs, whenever they ran
        lambda: float(sum(row["seconds"] for row in write_results(workdir)))
    )
    workspace.note("finetune", training.settings, seconds, training.facts())
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    job.failures += failures
