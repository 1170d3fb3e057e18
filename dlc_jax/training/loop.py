"""The loop of fine-tuning: steps and epochs, resumed where a run was stopped, kept as a result."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32, Int64
from tqdm import tqdm

from dlc_jax import expect
from dlc_jax.distributed import from_first, hides_bar, processes
from dlc_jax.files.array_files import read_npz
from dlc_jax.files.json_files import parse_json
from dlc_jax.types import RunResult, Selection
from dlc_jax.workspace import Workspace, Written, artefacts, records
from dlc_jax.workspace.checkpoints import Checkpoints

METRICS = "metrics.jsonl"
PER_CLASS = "per_class_accuracy.csv"
PREDICTIONS = "predictions.npz"  # of the test samples, by runs that have them
CHECKPOINT = "checkpoint"
STOPPED = "stopped"  # of a run that was stopped where it keeps no checkpoint by itself
ADAPTER = "adapter"
SEEN = "seen"  # what a watch keeps of every epoch
ERROR = "error.txt"


class RunFolder(NamedTuple):
    """The folder of one run: metrics.jsonl, per_class_accuracy.csv, checkpoint/.

    Attributes:
      path: The folder.
      identity: Hash of what decides the run; checkpoints of another run are not restored.
      say: Takes a line for each checkpoint that is damaged.
    """

    path: Path
    identity: str
    say: Callable[[str], None] = print

    def checkpoints(self, name: str = CHECKPOINT) -> Checkpoints:
        """Opens the checkpoints of the run."""
        return Checkpoints(self.path / name, self.identity, self.path / SEEN, self.say)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl`, one line per epoch; numbers that are not finite as null."""
    with artefacts.atomic(folder / METRICS, "w") as file:
        for epoch in history:
            file.write(f"{json.dumps(artefacts.finite(epoch), allow_nan=False)}\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns what `write_metrics` wrote, null as NaN."""
    path = folder / METRICS
    lines = [parse_json(line, dict, path) for line in path.read_text().splitlines()]
    return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]


def write_per_class(
    folder: Path, result: RunResult, class_names: Iterable[str], num_test: np.ndarray | None
) -> None:
    """Writes `per_class_accuracy.csv`.

    Args:
      folder: Folder of the run.
      result: Accuracies, in percent.
      class_names: Names of the c classes.
      num_test: [c] test samples of each class; None without a test set.
    """
    with artefacts.atomic(folder / PER_CLASS, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("label", "class_name", "num_test", "test_accuracy"))
        for label, name in enumerate(class_names):
            number = 0 if num_test is None else int(num_test[label])
            tested = result.per_class_accuracy if number else None
            accuracy = "" if tested is None else repr(float(tested[label]))
            table.writerow((label, expect.csv_cell(expect.visible(name)), number, accuracy))


def write_predictions(
    folder: Path, predicted: Int32[np.ndarray, " t"], labels: Int32[np.ndarray, " t"]
) -> None:
    """Writes `predictions.npz`: class ids of the test samples, `predicted` [t] and `labels` [t]."""
    with artefacts.atomic(folder / PREDICTIONS) as file:
        np.savez(file, allow_pickle=False, predicted=predicted, labels=labels)


def read_predictions(folder: Path) -> tuple[Int32[np.ndarray, " t"], Int32[np.ndarray, " t"]]:
    """Returns the predicted and the right class of each test sample.

    Raises:
      ValueError: the file is not there, damaged, or not as the run left it.
    """
    run, path = records.read(folder, records.RUN), folder / PREDICTIONS
    found = read_npz(path, {"predicted": ("i", 1), "labels": ("i", 1)})
    if run is None or run.outputs.get(PREDICTIONS) != artefacts.file_hash(path):
        raise expect.InputError(f"{path}: not as the run left it, by its run.json.")
    return found["predicted"], found["labels"]


Result = TypeVar("Result")
EpochSums = dict[str, Any]  # numbers, and texts that grow
_STEPS_LATE = 2  # sums of a step are waited for so late, so that the device is never idle


class Progress(NamedTuple):
    """A run after some of its steps.

    Attributes:
      state: All that a step changes.
      history: A line per finished epoch.
      sums: Added up over the steps of the epoch after these: `num_steps`, `elapsed_s`, `loss`, and
        what else the trainer adds; empty before the first one.
    """

    state: Any
    history: list[dict[str, Any]]
    sums: EpochSums

    @classmethod
    def of(cls, state: Any, facts: list[dict[str, Any]]) -> Progress:
        """Returns the progress that a checkpoint holds."""
        if facts and "num_steps" in facts[-1]:
            return cls(state, facts[:-1], facts[-1])
        return cls(state, facts, {})

    @property
    def facts(self) -> list[dict[str, Any]]:
        """For a checkpoint: the lines, and last the sums, if any."""
        return [*self.history, self.sums] if self.sums else self.history

    @property
    def num_steps(self) -> int:
        """Number of steps since the last finished epoch."""
        return int(self.sums.get("num_steps", 0))

    @property
    def elapsed_s(self) -> float:
        """Time of all steps."""
        of_epochs = self.history[-1].get("elapsed_s", 0.0) if self.history else 0.0
        return of_epochs + self.sums.get("elapsed_s", 0.0)


@runtime_checkable
class Trainer(Protocol[Result]):
    """Fine-tunes on subsets of one data set.

    Attributes:
      kind: Kind of result; see `Step`.
      files: Files that every finished run has in its folder.
      keeps_weights: Whether the last checkpoint of a finished run is kept.
      num_epochs: Passes over the kept samples.
      checkpoint_steps: Steps between checkpoints, which are numbered by steps; 0: there is one
        after every epoch, and they are numbered by epochs.
      shows_bars: Whether to show bars.
      remedy: What to try where a loss is not finite.
      mesh: Devices; None: the default one.
      fingerprint: SHA-256 over all that its runs have in common.
      notes: What the user should know before the first run.
    """

    kind: str
    files: tuple[str, ...]
    keeps_weights: bool
    num_epochs: int
    checkpoint_steps: int
    shows_bars: bool
    remedy: str

    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def notes(self) -> list[str]: ...

    def positions(self, kept: Selection, /) -> Int64[np.ndarray, " k"]:
        """Returns where the kept samples are in the data set."""

    def start(self, positions: Int64[np.ndarray, " k"], seed: int, /) -> Any:
        """Returns the state before the first step, a tree of JAX arrays."""

    def steps_per_epoch(self, num_samples: int, /) -> int:
        """Returns the steps that an epoch over so many samples takes."""

    def rates(self, steps_per_epoch: int, /) -> list[float]:
        """Returns the learning rate of every step of a run."""

    def batches(
        self, positions: Int64[np.ndarray, " k"], seed: int, epoch: int, first: int, /
    ) -> Iterator[Any]:
        """Yields the batches of an epoch but for the first ones; epochs count from 1."""

    def step(self, state: Any, batch: Any, rate: float, /) -> tuple[Any, Callable[[], EpochSums]]:
        """Takes a step; returns the new state, and what waits for the step's part of the sums."""

    def line(self, progress: Progress, rate: float, /) -> dict[str, Any]:
        """Returns the metrics of an epoch all of whose steps are done, `elapsed_s` among them."""

    def result(self, progress: Progress, positions: Int64[np.ndarray, " k"], /) -> Result:
        """Returns what a run ends with."""

    def write(self, folder: Path, result: Result, /) -> dict[str, Any]:
        """Writes the files of a finished run; returns a summary of its result."""

    def said(self, result: Result, /) -> str:
        """Returns the line to print at the end of a run."""

    def complete(self, workspace: Workspace, /) -> None:
        """Adds to the folder of a finished run what is asked for besides."""


@runtime_checkable
class Watch(Protocol):
    """Sees every epoch of a run before the epoch's checkpoint counts; its time is the epoch's.

    Attributes:
      last_epoch: Epoch that the run ends after, on the schedule of all.
      key: What decides what it keeps.
    """

    @property
    def last_epoch(self) -> int: ...
    @property
    def key(self) -> list[Any]: ...

    def __call__(self, epoch: int, state: Any, sums: EpochSums, /) -> None:
        """Takes the state after an epoch, and the sums over its steps."""


def train(
    trainer: Trainer[Result],
    positions: Int64[np.ndarray, " k"],
    seed: int,
    folder: RunFolder | None = None,
    watch: Watch | None = None,
) -> Result:
    """Trains on some samples, or resumes a run that was stopped.

    On a mesh of several processes all of them call this, and the first alone gives a folder.

    Args:
      trainer: What trains.
      positions: Kept samples, ascending, in the data set.
      seed: Seed of the first state, data order and augmentation.
      folder: Where the run keeps its state; None: nowhere.
      watch: Sees every epoch.
    """
    expect.seed(seed)
    progress, mesh = Progress(trainer.start(positions, seed), [], {}), trainer.mesh
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if folder is not None:
            checkpoints = stack.enter_context(folder.checkpoints())
            progress = _restored(progress, folder, checkpoints)
        if mesh is not None:
            progress = Progress.of(*from_first(mesh, progress.state, progress.facts))
        # what is kept nowhere need not be brought to an end
        if folder is not None or (mesh is not None and mesh.is_multi_process):
            stack.enter_context(processes.at_steps())
        steps_per_epoch = trainer.steps_per_epoch(len(positions))
        rates = trainer.rates(steps_per_epoch)
        loop = _Loop(trainer, positions, seed, steps_per_epoch, rates, folder, checkpoints, watch)
        last = trainer.num_epochs if watch is None else watch.last_epoch
        while len(progress.history) < last:
            progress = loop.epoch(progress)
    return trainer.result(progress, positions)


def not_finite(what: str, step: int, rate: float, remedy: str) -> expect.SharedError:
    """Returns the error of a run that has gone astray."""
    return expect.SharedError(
        f"fine-tuning gave {what} not finite, at step {step}, learning rate {rate:g}; {remedy}."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """What the epochs of a run share; see `train`."""

    trainer: Trainer[Any]
    positions: Int64[np.ndarray, " k"]
    seed: int
    steps_per_epoch: int
    rates: list[float]
    folder: RunFolder | None
    checkpoints: Checkpoints | None
    watch: Watch | None

    def epoch(self, progress: Progress) -> Progress:
        """Takes the steps of an epoch that are not done yet."""
        trainer, epoch, done = self.trainer, len(progress.history) + 1, progress.num_steps
        before = (epoch - 1) * self.steps_per_epoch
        bar = tqdm(
            trainer.batches(self.positions, self.seed, epoch, done),
            f"epoch {epoch}/{trainer.num_epochs}",
            self.steps_per_epoch,
            initial=done,
            unit="step",
            leave=False,
            disable=hides_bar(trainer.shows_bars),
        )
        state, pending = progress.state, collections.deque[tuple[int, Any]]()
        parts = [progress.sums]  # added up where they are needed
        start = time.perf_counter()
        for step, batch in enumerate(bar, start=before + done + 1):
            state, added = trainer.step(state, batch, self.rates[step - 1])
            pending.append((step, added))
            ends, leaves = step == before + self.steps_per_epoch, processes.is_due()
            every = trainer.checkpoint_steps
            saves = ends or (every > 0 and step % every == 0)
            while len(pending) > (0 if saves or leaves else _STEPS_LATE):
                parts.append(self._part(*pending.popleft()))
            if not (saves or leaves):
                continue
            sums = _total([*parts, {"elapsed_s": time.perf_counter() - start}])
            parts, progress = [sums], Progress(state, progress.history, sums)
            if saves:
                progress = self._saved(progress, step, ends=ends)
            if leaves:
                self._leave(progress, step, is_saved=saves)
            start = time.perf_counter()
        return progress

    def _part(self, step: int, added: Callable[[], EpochSums]) -> EpochSums:
        """Returns the part of a step in the sums; ValueError if its loss is not finite."""
        part = {"num_steps": 1, **added()}
        if not math.isfinite(loss := part["loss"]):
            rate, remedy = self.rates[step - 1], self.trainer.remedy
            raise not_finite(f"a loss ({loss}) that is", step, rate, remedy)
        return part

    def _saved(self, progress: Progress, step: int, *, ends: bool) -> Progress:
        """Keeps a run that goes on, with the line of an epoch that ends, once it was watched."""
        if ends:
            line = self.trainer.line(progress, self.rates[step - 1])
            if self.watch is not None:
                start = time.perf_counter()
                self.watch(line["epoch"], progress.state, progress.sums)
                line["elapsed_s"] = round(line["elapsed_s"] + time.perf_counter() - start, 3)
            progress = Progress(progress.state, [*progress.history, line], {})
        if self.folder is not None and self.checkpoints is not None:
            number = step if self.trainer.checkpoint_steps else len(progress.history)
            self.checkpoints.save(number, progress.state, progress.facts)
            if ends:
                write_metrics(self.folder.path, progress.history)
        return progress

    def _leave(self, progress: Progress, step: int, *, is_saved: bool) -> NoReturn:
        """Keeps a run that has to stop, and stops."""
        if self.folder is not None and not is_saved:  # first: it is what would be lost
            with self.folder.checkpoints(STOPPED) as stopped:
                stopped.save(step, progress.state, progress.facts)
        if self.checkpoints is not None:
            self.checkpoints.wait()
        processes.stop_together()


def _restored(new: Progress, folder: RunFolder, checkpoints: Checkpoints) -> Progress:
    """Returns how far a run is on disk: after its last checkpoint, or where it was stopped."""
    found = [checkpoints.restore(new.state)]
    if (folder.path / STOPPED).is_dir():
        with folder.checkpoints(STOPPED) as stopped:
            found.append(stopped.restore(new.state))
    there = [new, *(Progress.of(*saved) for saved in found if saved is not None)]
    return max(there, key=lambda progress: (len(progress.history), progress.num_steps))


def _total(parts: list[EpochSums]) -> EpochSums:
    """Adds up numbers, in order, and joins texts."""
    values: dict[str, list[Any]] = {}
    for part in parts:
        for name, value in part.items():
            values.setdefault(name, []).append(value)
    return {
        name: "".join(some) if isinstance(some[0], str) else functools.reduce(operator.add, some)
        for name, some in values.items()
    }


def key_of_run(fingerprint: str, positions: Int64[np.ndarray, " k"], seed: int) -> dict[str, Any]:
    """Returns what decides a run: what it shares with others, kept samples and seed."""
    return {
        "shared": fingerprint,
        "kept": artefacts.json_hash(positions.tolist()),
        "seed": int(seed),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class RunStep:
    """A run in a folder of its own.

    Attributes:
      trainer: What trains.
      positions: Kept samples, ascending, in the data set.
      seed: Seed of the run.
      root: Folder of the run.
      facts: What `run.json` holds besides, from the start of the run on.
      settings: Settings as the user knows them.
      say: Takes a line for each checkpoint that is damaged.
      watch: Sees every epoch.
    """

    trainer: Trainer[Any]
    positions: Int64[np.ndarray, " k"]
    seed: int
    root: Path
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = expect.show
    watch: Watch | None = None

    name = records.RUN
    stage = "finetune"

    @property
    def kind(self) -> str:
        return self.trainer.kind

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        shared = self.trainer.fingerprint
        if self.watch is not None:
            shared = artefacts.json_hash([shared, *self.watch.key])
        return key_of_run(shared, self.positions, self.seed)

    @property
    def files(self) -> tuple[str, ...]:
        return self.trainer.files

    @property
    def optional(self) -> tuple[str, ...]:
        is_kept = self.trainer.keeps_weights and (self.root / CHECKPOINT).exists()
        return () if is_kept else (CHECKPOINT,)

    def compute(self, scratch: Path | None) -> Any:
        folder = None
        if scratch is not None:
            folder = RunFolder(scratch, artefacts.json_hash(self.key), self.say)
        return train(self.trainer, self.positions, self.seed, folder, self.watch)

    def write(self, root: Path, result: Any) -> Written:
        summary = self.trainer.write(root, result)
        names = [*self.files]
        if (root / PREDICTIONS).exists():  # of a trainer that has them
            names.append(PREDICTIONS)
        if self.trainer.keeps_weights:
            names += [f"{CHECKPOINT}/{name}" for name in artefacts.names_below(root / CHECKPOINT)]
        return Written(names, {**self.facts, records.RESULT: summary}, seconds=result.seconds)

    @property
    def obsolete(self) -> tuple[str, ...]:
        return (ERROR, STOPPED) if self.trainer.keeps_weights else (ERROR, STOPPED, CHECKPOINT)
