"""How many weights each probe zeroes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks

PLACEMENTS = ("grid", "midpoint")
AUTO = "auto"  # as num_probes: as many as it takes
_AUTO_FIRST, _AUTO_FACTOR = 5, 3  # midpoints of thirds are midpoints again
_OFFICIAL_LENGTH = 50  # the paper's and the released code's number of probes


def linear(num_weights: int, step: float, num_steps: int) -> list[int]:
    """Returns round(step k N) for k = 0..num_steps-1 (half to even).

    Source: Jiang et al. 2025, figure 2.
    """
    return [round(step * k * num_weights) for k in range(num_steps)]


def geometric(num_weights: int, step: float, num_steps: int) -> list[int]:
    """Returns running sums of round(step x remaining) (half to even), starting with 0.

    Source: released score-wot.py, through torch.nn.utils.prune.
    """
    counts = [0]
    while len(counts) < num_steps:
        counts.append(counts[-1] + round(step * (num_weights - counts[-1])))
    return counts[:num_steps]


SCHEDULES: dict[str, Callable[[int, float, int], list[int]]] = {
    "linear": linear,
    "geometric": geometric,
}


class PathCounts(NamedTuple):
    """How many of the least important weights go, at every step of the path.

    Attributes:
      grid: Numbers of weights.
      steps: Which of these steps are probes, ascending.
    """

    grid: Int64[np.ndarray, " steps"]
    steps: Int64[np.ndarray, " m"]

    @property
    def chosen(self) -> Int64[np.ndarray, " m"]:
        """How many weights each probe zeroes."""
        return self.grid[self.steps]


def path_counts(
    num_weights: int,
    *,
    schedule: str = "linear",
    step: float = 0.02,
    num_probes: int | str = 50,
    placement: str = "grid",
    max_sparsity: float = 1.0,
) -> PathCounts:
    """Returns how many weights the steps of the path zero, and which of the steps are probes.

    Args:
      num_weights: N, prunable weights of the whole network.
      schedule: `linear` (paper) or `geometric` (released code).
      step: Share zeroed per step: of all weights (linear) or of the remaining ones (geometric).
      num_probes: With `grid`, the length of the path: its first `num_probes` steps. With
        `midpoint`, how many probes stand for the whole path. `auto`: all steps of that.
      placement: `grid`, or `midpoint`: grid steps floor((j + 0.5) m / num_probes) of the m steps
        of the whole path (linear: all below full sparsity; geometric: 50).
      max_sparsity: Steps that zero a larger share are cut off the path.
    Raises:
      ValueError: an unknown name, a value out of range, or a path that reaches full sparsity.
    Source: Jiang et al. 2025, section 3.
    """
    check_path(schedule, step, num_probes, placement, max_sparsity)
    whole = math.ceil(round(1 / step, 9)) if schedule == "linear" else _OFFICIAL_LENGTH
    asked = whole if num_probes == AUTO else int(num_probes)
    length = asked if placement == "grid" else max(whole, asked)
    counts = np.asarray(SCHEDULES[schedule](num_weights, step, length), np.int64)
    counts = counts[(counts <= round(max_sparsity * num_weights)) & (counts < num_weights)]
    if placement == "grid" or asked >= len(counts):
        return PathCounts(counts, np.arange(len(counts)))
    return PathCounts(counts, _midpoints(len(counts), asked))


def refinements(num_steps: int) -> Iterator[Int64[np.ndarray, " m"]]:
    """Yields more and more steps of a path, each time those before among them; at last all.

    5, 15, 45, ... midpoints: floor((j + 0.5) num_steps / m) of 3 m hold those of m.
    """
    num = _AUTO_FIRST
    while num < num_steps:
        yield _midpoints(num_steps, num)
        num *= _AUTO_FACTOR
    yield np.arange(num_steps)


def _midpoints(num_steps: int, num: int) -> Int64[np.ndarray, " m"]:
    return np.array([(2 * j + 1) * num_steps // (2 * num) for j in range(num)], np.int64)


def check_path(
    schedule: str, step: float, num_probes: int | str, placement: str, max_sparsity: float
) -> None:
    """Raises ValueError unless these describe a path; names are those of the configuration."""
    checks.one_of("probe.schedule", schedule, SCHEDULES)
    checks.one_of("probe.placement", placement, PLACEMENTS)
    checks.at_least("probe.step", step, 0, exclusive=True)
    checks.at_most("probe.step", step, 1, exclusive=True)
    checks.at_least("probe.max_sparsity", max_sparsity, 0, exclusive=True)
    checks.at_most("probe.max_sparsity", max_sparsity, 1)
    if isinstance(num_probes, str):
        if num_probes != AUTO:
            raise checks.InputError(
                f"probe.num_probes: expected {AUTO!r} or an integer >= 1, got {num_probes!r}."
            )
        return
    checks.at_least("probe.num_probes", num_probes, 1)
    longest = math.ceil(round(1 / step, 9))
    if schedule == "linear" and num_probes > longest:
        raise checks.InputError(
            f"probe.num_probes: {num_probes} probes at step {step} run past full sparsity; "
            f"at most {longest}, or a smaller probe.step."
        )
