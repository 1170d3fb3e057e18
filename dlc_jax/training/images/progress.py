"""How far a run is, and who observes it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from dlc_jax.training.images.step import TrainState


class Open(NamedTuple):
    """The steps of an epoch that was left before its end.

    Attributes:
      num_steps: How many are done.
      loss: Summed over their samples, in nats.
      correct: Of each sample in the epoch's order, whether it was classified right: `0` or `1`.
      elapsed_s: Time they took.
    """

    num_steps: int
    loss: float
    correct: str
    elapsed_s: float

    @property
    def correct_array(self) -> Bool[np.ndarray, " r"]:
        return np.frombuffer(self.correct.encode(), np.uint8) == ord("1")


class Progress(NamedTuple):
    """A run after some of its epochs, and perhaps some steps of another.

    Attributes:
      state: Where it stands.
      history: A line per finished epoch.
      correct: In the last epoch, unless that was restored.
      open: Steps after it; None: none.
    """

    state: TrainState
    history: list[dict[str, Any]]
    correct: Bool[np.ndarray, " k"] | None = None
    open: Open | None = None

    @classmethod
    def of(cls, state: TrainState, told: list[dict[str, Any]]) -> Progress:
        """Returns what a checkpoint holds."""
        if told and "num_steps" in told[-1]:
            return cls(state, told[:-1], open=Open(**told[-1]))
        return cls(state, told)

    @property
    def told(self) -> list[dict[str, Any]]:
        """For a checkpoint: the lines, and last what is open."""
        return self.history if self.open is None else [*self.history, self.open._asdict()]

    @property
    def elapsed_s(self) -> float:
        return self.history[-1].get("elapsed_s", 0.0) if self.history else 0.0


@runtime_checkable
class Observer(Protocol):
    """Is told of every epoch, before the epoch's checkpoint counts.

    `correct` says of each position whether it was classified right when the epoch trained on it.
    """

    def __call__(
        self, epoch: int, state: TrainState, correct: Bool[np.ndarray, " k"], /
    ) -> None: ...


def observed(progress: Progress, observer: Observer) -> Progress:
    """Shows the observer the last epoch, and adds its time to the epoch's."""
    assert progress.correct is not None
    start = time.perf_counter()
    line = progress.history[-1]
    observer(line["epoch"], progress.state, progress.correct)
    elapsed = round(line["elapsed_s"] + time.perf_counter() - start, 3)
    return progress._replace(history=[*progress.history[:-1], {**line, "elapsed_s": elapsed}])
