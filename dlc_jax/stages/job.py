"""What the stages of one command share."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from dlc_jax.config import Config
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.tasks import Task
from dlc_jax.types import Selection
from dlc_jax.workspace import Workspace


@dataclasses.dataclass
class Job:
    """State shared by the stages that use scores.

    Attributes:
      config: Checked configuration.
      workspace: Work directory, held by this run.
      task: The kind of data, with these settings.
      inputs: Scores and other inputs of selections; None in processes other than the first.
      shown: Selection that the summary shows; None before one is made.
      failures: A line for each run that failed; the others go on.
    """

    config: Config
    workspace: Workspace
    task: Task
    inputs: SelectionInputs | None = None
    shown: Selection | None = None
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> SelectionInputs:
        """The inputs, in the first process, the only one that holds them."""
        assert self.inputs is not None
        return self.inputs


@runtime_checkable
class Stage(Protocol):
    """A module of this package named after its stage, which uses scores."""

    def run(self, job: Job, /) -> None:
        """Runs the stage, in all processes.

        Raises:
          ValueError: anything wrong with data, model or what earlier stages left.
        """
