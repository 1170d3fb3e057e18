"""What the stages of one command share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from dlc_jax.config import Config
from dlc_jax.stages.score import Load
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.workspace import Workspace


@dataclasses.dataclass
class Job:
    """A command that uses scores on disk.

    Attributes:
      config: Checked configuration.
      workspace: Work directory, which nobody else writes to.
      load: Loads a data set by its source, in one process.
      load_together: Loads it in all processes at once, which must see the same samples.
      known: Scores and what selections need beside them; None in processes other than the first.
      failures: A line for each run that failed; the others go on.
    """

    config: Config
    workspace: Workspace
    load: Load
    load_together: Load
    known: SelectionInputs | None = None
    failures: list[str] = dataclasses.field(default_factory=list)

    def with_scores(self, do: Callable[[SelectionInputs], None]) -> None:
        """Does something in the first process, which alone has the scores.

        Raises:
          ValueError: in all processes, if it or OSError is raised in the first.
        """

        def alone() -> None:
            assert self.known is not None
            do(self.known)

        self.workspace.alone(alone)


@runtime_checkable
class Stage(Protocol):
    """A module of this package, called as its stage is, that uses scores."""

    def run(self, job: Job, /) -> None:
        """Runs the stage, in all processes.

        Raises:
          ValueError: anything wrong with data, model or what earlier stages left.
        """
        ...
