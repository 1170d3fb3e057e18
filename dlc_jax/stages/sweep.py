"""The runs of a sweep: one for every selected cell and for the full set, sharing programs."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import processes, said_of, stopping
from dlc_jax.distributed.processes import on_first, told_by_first
from dlc_jax.selection import FULL, Cell
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.sweep_results import facts_of, read_runs, write_results
from dlc_jax.stages.what_was_scored import check_is_what_was_scored
from dlc_jax.training.folder import ERROR, RunFolder
from dlc_jax.types import Dataset, Selection
from dlc_jax.workspace import artefacts


class SweepEnd(NamedTuple):
    """How a sweep ended.

    Attributes:
      failures: A line for every run that failed; the others are not touched by it.
      seconds: Time of all finished runs, whenever they ran.
    """

    failures: list[str]
    seconds: float


@runtime_checkable
class Tuner(Protocol):
    """Fine-tunes on subsets of one data set."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that its runs have in common."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user should know before the first run."""
        ...

    def positions(self, kept: Selection, /) -> Int64[np.ndarray, " k"]:
        """Returns where the kept samples are in the data set."""
        ...

    def inputs(self, positions: Int64[np.ndarray, " k"], seed: int, /) -> str:
        """SHA-256 over all that decides how a run ends."""
        ...

    def folder(self, path: Path, /) -> RunFolder:
        """Returns where a run is kept."""
        ...

    def run(
        self,
        positions: Int64[np.ndarray, " k"],
        seed: int,
        folder: RunFolder | None,
        facts: dict[str, Any] | None,
        /,
    ) -> Any:
        """Runs, or goes on where a stopped run ended; returns what `said` takes."""
        ...

    def complete(self, folder: RunFolder, /) -> None:
        """Brings what a finished run left to what is asked for now."""
        ...

    def said(self, result: Any, /) -> str:
        """Returns the line to print at the end of a run."""
        ...


def run_sweep(
    config: Config,
    workdir: Path,
    known: SelectionInputs | None,
    dataset: Dataset | Instructions,
    make_tuner: Callable[[], Tuner],
    echo: Callable[[str], None],
) -> SweepEnd:
    """Runs what is not finished yet, and rewrites `results.csv` after every run.

    Args:
      config: Checked configuration.
      workdir: Where scores and selections are.
      known: What was scored, and what the methods use; None in processes other than the first.
      dataset: What to train on.
      make_tuner: Of what trains on it; called once nothing else can go wrong.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        that does not fit, a work directory that is in use; or every run failed.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: check_is_what_was_scored(workdir, dataset))
        on_first(lambda: stack.enter_context(artefacts.locked(workdir / artefacts.FINETUNE)))
        tuner = make_tuner()
        sweep = _Sweep(config, workdir, known, tuner, echo)
        on_first(lambda: sweep.make_room(echo))
        # a table of runs set aside would be taken for this sweep's
        on_first(lambda: write_results(workdir))
        cells = config.runs()
        echo(f"finetune: {len(cells)} runs on {said_of(config.mesh.make())}")
        for note in tuner.notes:
            echo(visible(f"finetune: {note}"))
        failures = sweep.run_all(cells, echo)
    if len(failures) == len(cells):
        raise checks.SharedError(f"all {len(cells)} runs failed, first {failures[0]}")
    seconds = told_by_first(lambda: float(sum(row["seconds"] for row in write_results(workdir))))
    return SweepEnd(failures, seconds)


class _Sweep(NamedTuple):
    """What the runs of a sweep share."""

    config: Config
    workdir: Path
    known: SelectionInputs | None
    tuner: Tuner
    echo: Callable[[str], None]

    @property
    def shared(self) -> str:
        """SHA-256 of all that its runs have in common."""
        assert self.known is not None
        return artefacts.json_hash([self.tuner.fingerprint, self.known.samples.fingerprint])

    def folder(self, cell: Cell) -> RunFolder:
        """Returns where the run is kept."""
        folder = self.tuner.folder(self.workdir / artefacts.FINETUNE / cell.name)
        folder.say = lambda line: self.echo(f"finetune: {line}")
        return folder

    def run_all(self, cells: list[Cell], echo: Callable[[str], None]) -> list[str]:
        """Runs one after the other; returns a line for every one that failed."""
        failures, num_done = [], 0
        for number, cell in enumerate(cells, start=1):
            place = f"finetune: {number}/{len(cells)} {cell.name}"
            try:
                said = self.run(cell)
                if said is not None:
                    on_first(lambda: write_results(self.workdir))
            except Exception as error:  # whatever it is, the other runs go on
                if processes.count() > 1 and not isinstance(error, checks.SharedError):
                    raise  # unless other processes know nothing of it, and wait for this one
                reason = _reason(error, self.folder(cell))
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
        positions = self._positions_to_train(cell)
        if positions is None:
            return None
        if not processes.is_first():
            return self.tuner.said(self.tuner.run(positions, cell.seed, None, None))
        settings = dataclasses.asdict(self.config.training)
        facts = {"shared": self.shared, "cell": cell._asdict(), "settings": settings}
        result = self.tuner.run(positions, cell.seed, self.folder(cell), facts)
        return self.tuner.said(result)

    def _positions_to_train(self, cell: Cell) -> Int64[np.ndarray, " k"] | None:
        """Returns what the run trains on, in all processes; None if it was finished before."""
        found: list[np.ndarray | None] = [None]

        def look() -> int | None:
            found[0] = self._unfinished(cell)
            return None if found[0] is None else len(found[0])

        num = told_by_first(look)
        if num is None or processes.count() == 1:
            return found[0]
        mine = np.zeros(num, np.int32) if found[0] is None else found[0].astype(np.int32)
        return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.int64)

    def _unfinished(self, cell: Cell) -> Int64[np.ndarray, " k"] | None:
        """Returns what the run trains on, with its folder made ready; None if it is finished."""
        folder, facts = self.folder(cell), facts_of(self.workdir, cell)
        positions = self.tuner.positions(self._kept(cell))
        inputs = self.tuner.inputs(positions, cell.seed)
        keep_weights = self.config.training.keep_weights
        if folder.is_finished(inputs, keep_weights):
            if not keep_weights:
                folder.drop_weights()  # a kill may have come between result and deletion
            self.tuner.complete(folder)
            return None
        found = facts.get("inputs", inputs)
        if found != inputs:
            _move_over(folder.path, _aside(self.workdir, found))
        return positions

    def _kept(self, cell: Cell) -> Selection:
        assert self.known is not None
        samples, mode = self.known.samples, self.config.mode
        if cell.method != FULL:
            return self.known.read(cell)
        return Selection(
            indices=np.arange(len(samples.ids)),
            **cell._asdict(),
            mode=mode,
            num_kept_per_class=np.bincount(samples.labels, minlength=len(samples.class_names)),
            ids=samples.ids,
        )

    def make_room(self, echo: Callable[[str], None]) -> None:
        """Moves runs of other settings or scores to `superseded/`, and those of these back."""
        shared, num_moved = self.shared, 0
        runs, unreadable = read_runs(self.workdir)
        for name, facts in sorted(runs.items()):
            found = facts.get("shared", shared)
            if found != shared:
                _move_over(self.workdir / artefacts.FINETUNE / name, _aside(self.workdir, found))
                num_moved += 1
        for reason in unreadable.values():
            echo(f"finetune: note: a run is left out of {artefacts.RESULTS}: {reason}")
        if num_moved:
            echo(f"finetune: {num_moved} runs of other settings or scores moved to superseded/")
        for path in sorted(_aside(self.workdir, shared).glob("*/*")):
            if not (self.workdir / artefacts.FINETUNE / path.parent.name / path.name).exists():
                _move_over(path, self.workdir / artefacts.FINETUNE)


def _reason(error: Exception, folder: RunFolder) -> str:
    if isinstance(error, (checks.InputError, OSError)):
        return str(error)
    reason = checks.first_line(error)
    if not processes.is_first():
        return reason
    with contextlib.suppress(OSError):  # a full disk must not end the sweep
        with artefacts.atomic(folder.path / ERROR, "w") as file:
            file.writelines(traceback.format_exception(error))
        reason += f" (all of it in {folder.path / ERROR})"
    return reason


def _aside(workdir: Path, name: str) -> Path:
    return workdir / "superseded" / f"{artefacts.FINETUNE}-{name[:12]}"


def _move_over(run: Path, to: Path) -> None:
    """Moves a run; an older one of the same settings and cell makes place."""
    target = to / run.parent.name / run.name
    artefacts.remove(target)
    artefacts.move(run, target)
