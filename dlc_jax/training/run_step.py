"""A fine-tuning run as a result: what decides it, and what it leaves in its folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax.checks.escaping import show
from dlc_jax.training.folder import CHECKPOINT, ERROR, STOPPED, RunFolder
from dlc_jax.training.loop import Trainer, Watch, train
from dlc_jax.workspace import Written, artefacts, keys, records


def key_of_run(fingerprint: str, positions: Int64[np.ndarray, " k"], seed: int) -> dict[str, Any]:
    """Returns what decides a run: what it shares with others, kept samples and seed."""
    return {"shared": fingerprint, "kept": keys.json_hash(positions.tolist()), "seed": int(seed)}


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
    say: Callable[[str], None] = show
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
            shared = keys.json_hash([shared, *self.watch.key])
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
            folder = RunFolder(scratch, keys.json_hash(self.key), self.say)
        return train(self.trainer, self.positions, self.seed, folder, self.watch)

    def write(self, root: Path, result: Any) -> Written:
        summary = self.trainer.write(root, result)
        names = [*self.files]
        if self.trainer.keeps_weights:
            names += [f"{CHECKPOINT}/{name}" for name in artefacts.names_below(root / CHECKPOINT)]
        return Written(names, {**self.facts, records.RESULT: summary}, seconds=result.seconds)

    @property
    def obsolete(self) -> tuple[str, ...]:
        return (ERROR, STOPPED) if self.trainer.keeps_weights else (ERROR, STOPPED, CHECKPOINT)
