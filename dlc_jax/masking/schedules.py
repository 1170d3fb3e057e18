"""How many weights each probe zeroes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int64

PLACEMENTS = ("grid", "midpoint")
AUTO = "auto"  # as num_probes: as many as it takes
_AUTO_FIRST, _AUTO_FACTOR = 5, 3  # midpoints of thirds are midpoints again
OFFICIAL_LENGTH = 50  # the paper's and the released code's number of probes


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


def refinements(num_steps: int) -> Iterator[Int64[np.ndarray, " m"]]:
    """Yields more and more steps of a path, each time those before among them; at last all.

    5, 15, 45, ... midpoints: floor((j + 0.5) num_steps / m) of 3 m hold those of m.
    """
    num = _AUTO_FIRST
    while num < num_steps:
        yield midpoints(num_steps, num)
        num *= _AUTO_FACTOR
    yield midpoints(num_steps, num_steps)


def midpoints(num_steps: int, num: int) -> Int64[np.ndarray, " m"]:
    """Returns the steps in the middle of `num` equal parts of a path; all, of as many parts."""
    return (2 * np.arange(num) + 1) * num_steps // (2 * num)
