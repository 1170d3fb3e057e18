"""How far a run is, and who is told."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from dlc_jax.training.step import TrainState


class Progress(NamedTuple):
    """A run after some of its epochs."""

    state: TrainState
    history: list[dict[str, Any]]
    correct: Bool[np.ndarray, " k"] | None = None  # in the last epoch, unless that was restored

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
