"""How many weights each probe zeroes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks

PLACEMENTS = ("grid", "midpoint")
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
    """How many of the least important weights go, at every grid step and at the chosen ones."""

    grid: Int64[np.ndarray, " steps"]
    chosen: Int64[np.ndarray, " m"]


def path_counts(
    num_weights: int,
    *,
    schedule: str = "linear",
    step: float = 0.02,
    num_probes: int = 50,
    placement: str = "grid",
    max_sparsity: float = 1.0,
) -> PathCounts:
    """Returns how many weights the steps of the path zero, and which of the steps are probes.

    Args:
      num_weights: N, prunable weights of the whole network.
      schedule: `linear` (paper) or `geometric` (released code).
      step: Share zeroed per step: of all weights (linear) or of the remaining ones (geometric).
      num_probes: With `grid`, the length of the path: its first `num_probes` steps. With
        `midpoint`, how many probes stand for the whole path.
      placement: `grid`, or `midpoint`: grid steps floor((j + 0.5) m / num_probes) of the m steps
        of the whole path (linear: all below full sparsity; geometric: 50).
      max_sparsity: Steps that zero a larger share are cut off the path.
    Raises:
      ValueError: an unknown name, a value out of range, or a path that reaches full sparsity.
    Source: Jiang et al. 2025, section 3.
    """
    check_path(schedule, step, num_probes, placement, max_sparsity)
    length = num_probes
    if placement == "midpoint":
        whole = math.ceil(round(1 / step, 9)) if schedule == "linear" else _OFFICIAL_LENGTH
        length = max(whole, num_probes)
    counts = np.asarray(SCHEDULES[schedule](num_weights, step, length), np.int64)
    counts = counts[(counts <= round(max_sparsity * num_weights)) & (counts < num_weights)]
    if placement == "grid" or num_probes >= len(counts):
        return PathCounts(counts, counts)
    chosen = [int((j + 0.5) * len(counts) / num_probes) for j in range(num_probes)]
    return PathCounts(counts, counts[chosen])


def check_path(
    schedule: str, step: float, num_probes: int, placement: str, max_sparsity: float
) -> None:
    """Raises ValueError unless these describe a path; names are those of the configuration."""
    checks.one_of("probe.schedule", schedule, SCHEDULES)
    checks.one_of("probe.placement", placement, PLACEMENTS)
    checks.at_least("probe.step", step, 0, exclusive=True)
    checks.at_most("probe.step", step, 1, exclusive=True)
    checks.at_least("probe.num_probes", num_probes, 1)
    checks.at_least("probe.max_sparsity", max_sparsity, 0, exclusive=True)
    checks.at_most("probe.max_sparsity", max_sparsity, 1)
    longest = math.ceil(round(1 / step, 9))
    if schedule == "linear" and num_probes > longest:
        raise checks.InputError(
            f"probe.num_probes: {num_probes} probes at step {step} run past full sparsity; "
            f"at most {longest}, or a smaller probe.step."
        )
