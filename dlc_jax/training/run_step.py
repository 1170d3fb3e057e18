"""A fine-tuning run as a result: what decides it, and what it leaves in its folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64

from dlc_jax.checks.escaping import show
from dlc_jax.training.folder import CHECKPOINT, ERROR, STOPPED, RunFolder
from dlc_jax.types import Selection
from dlc_jax.workspace import Workspace, Written, artefacts, keys, records

Result = TypeVar("Result")


@runtime_checkable
class Trains(Protocol[Result]):
    """Fine-tunes on subsets of one data set.

    Attributes:
      kind: Kind of result; see `Step`.
      files: Files that every finished run has in its folder.
      keeps_weights: Whether the last checkpoint of a finished run is kept.
      fingerprint: SHA-256 over all that its runs have in common.
    """

    @property
    def kind(self) -> str: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def keeps_weights(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...

    def run(
        self, positions: Int64[np.ndarray, " k"], seed: int, folder: RunFolder | None, /
    ) -> Result:
        """Trains, or resumes a run that was stopped; None: nothing is kept of it meanwhile."""
        ...

    def write(self, folder: Path, result: Result, /) -> dict[str, Any]:
        """Writes the files of a finished run; returns a summary of its result."""
        ...


@runtime_checkable
class Tuner(Trains[Result], Protocol[Result]):
    """What a sweep trains with.

    Attributes: see `Trains`.
      notes: What the user should know before the first run.
    """

    @property
    def notes(self) -> list[str]: ...

    def positions(self, kept: Selection, /) -> Int64[np.ndarray, " k"]:
        """Returns where the kept samples are in the data set."""
        ...

    def said(self, result: Result, /) -> str:
        """Returns the line to print at the end of a run."""
        ...

    def complete(self, workspace: Workspace, /) -> None:
        """Adds to the folder of a finished run what is asked for besides."""
        ...


def key_of_run(fingerprint: str, positions: Int64[np.ndarray, " k"], seed: int) -> dict[str, Any]:
    """Returns what decides a run: what it shares with others, kept samples and seed."""
    kept = keys.json_hash(positions.tolist())
    return {"shared": fingerprint, "kept": kept, "seed": int(seed)}


@dataclasses.dataclass(frozen=True, eq=False)
class RunStep:
    """A run of a tuner in a folder of its own.

    Attributes:
      tuner: What trains.
      positions: Kept samples, ascending, in the data set.
      seed: Seed of the run.
      root: Folder of the run.
      facts: What `run.json` holds besides, from the start of the run on.
      settings: Settings as the user knows them.
      say: Takes a line for each checkpoint that is damaged.
    """

    tuner: Trains[Any]
    positions: Int64[np.ndarray, " k"]
    seed: int
    root: Path
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = show

    name = records.RUN
    stage = "finetune"

    @property
    def kind(self) -> str:
        return self.tuner.kind

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        return key_of_run(self.tuner.fingerprint, self.positions, self.seed)

    @property
    def files(self) -> tuple[str, ...]:
        return self.tuner.files

    @property
    def optional(self) -> tuple[str, ...]:
        is_kept = self.tuner.keeps_weights and (self.root / CHECKPOINT).exists()
        return () if is_kept else (CHECKPOINT,)

    def compute(self, scratch: Path | None) -> Any:
        folder = None
        if scratch is not None:
            folder = RunFolder(scratch, keys.json_hash(self.key), self.say)
        return self.tuner.run(self.positions, self.seed, folder)

    def write(self, root: Path, result: Any) -> Written:
        summary = self.tuner.write(root, result)
        names = [*self.files]
        if self.tuner.keeps_weights:
            names += [f"{CHECKPOINT}/{name}" for name in artefacts.names_below(root / CHECKPOINT)]
        return Written(names, {**self.facts, records.RESULT: summary}, seconds=result.seconds)

    @property
    def obsolete(self) -> tuple[str, ...]:
        return (ERROR, STOPPED) if self.tuner.keeps_weights else (ERROR, STOPPED, CHECKPOINT)
