"""Which masked copies of a network are probed, and how many weights each zeroes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.masking.thresholds import MASKINGS
from dlc_jax.types import Conventions, overridden, setting

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


SomePath = TypeVar("SomePath", bound="PathSpec")


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


@dataclasses.dataclass(frozen=True)
class PathSpec:
    """The learning path: masked copies of a network, each with more weights zeroed.

    Attributes:
      schedule: `linear` (paper) or `geometric` (released code); None lets `mode` decide.
      num_probes: m; with placement `grid`, the first m steps of the path. `auto`: 5 midpoints of
        the whole path, and three times as many as long as `certify` does not find them enough.
      agreement: With `auto`: the lower end of Spearman's interval that is enough, in (0, 1].
      placement: `grid`, or `midpoint`: of the s steps of the whole path (linear: all below full
        sparsity; geometric: 50), the steps floor((j + 0.5) s / num_probes).
      max_sparsity: Steps that zero a larger share are cut off the path, in (0, 1].
      step: Share zeroed per step, in (0, 1): of all weights (linear) or of the remaining ones
        (geometric).
      masking: `l1`, magnitude, or `random`.
      augment: Whether each probe sees a fresh random crop and flip, as in the released code; of
        images only.
    Source: Jiang et al. 2025, section 3.

    Example: `dlc.probe(encoder, dataset, path=dlc.PathSpec(num_probes=8, placement="midpoint"))`.
    """

    schedule: str | None = setting(None, f"{', '.join(SCHEDULES)}; None: by mode")
    num_probes: int | str = setting(
        50, "masked networks; with placement grid the path's first steps; auto: as it takes"
    )
    agreement: float = setting(0.98, "auto: least Spearman correlation with the ranking by all")
    placement: str = setting("grid", f"{', '.join(PLACEMENTS)}: midpoint spreads num_probes")
    max_sparsity: float = setting(1.0, "cuts the path, in (0, 1]")
    step: float = setting(0.02, "share of weights zeroed per step")
    masking: str = setting("l1", ", ".join(MASKINGS))
    augment: bool = setting(False, "fresh random crop and flip for every probe")

    def for_mode(self: SomePath, mode: str) -> SomePath:
        """Returns the path with the schedule that `mode` decides filled in, checked.

        Raises:
          ValueError: an unknown name, a value out of range, or a path that reaches full sparsity.
        """
        found = overridden(self, schedule=self.schedule or Conventions.of(mode).schedule)
        found.check()
        return found

    def check(self) -> None:
        """Raises ValueError unless these describe a path; names are those of the configuration."""
        if self.schedule is not None:
            expect.one_of("probe.schedule", self.schedule, SCHEDULES)
        expect.one_of("probe.placement", self.placement, PLACEMENTS)
        for name in ("step", "max_sparsity", "agreement"):
            expect.at_least(f"probe.{name}", getattr(self, name), 0, exclusive=True)
            expect.at_most(f"probe.{name}", getattr(self, name), 1, exclusive=name == "step")
        expect.one_of("probe.masking", self.masking, MASKINGS)
        if self.num_probes == AUTO:
            return
        if isinstance(self.num_probes, str):
            raise expect.InputError(
                f"probe.num_probes: expected {AUTO!r} or an integer >= 1, got {self.num_probes!r}."
            )
        expect.at_least("probe.num_probes", self.num_probes, 1)
        if self.schedule == "linear" and self.num_probes > self._whole:
            raise expect.InputError(
                f"probe.num_probes: {self.num_probes} probes at step {self.step} run past full "
                f"sparsity; at most {self._whole}, or a smaller probe.step."
            )

    @property
    def _whole(self) -> int:
        """Number of steps of the whole path."""
        return math.ceil(round(1 / self.step, 9)) if self.schedule == "linear" else OFFICIAL_LENGTH

    def counts(self, num_weights: int) -> PathCounts:
        """Returns how many weights the steps of the path zero, and which of them are probes.

        Args:
          num_weights: N, prunable weights of the whole network.
        """
        assert self.schedule is not None  # see `for_mode`
        asked = self._whole if self.num_probes == AUTO else int(self.num_probes)
        length = asked if self.placement == "grid" else max(self._whole, asked)
        counts = np.asarray(SCHEDULES[self.schedule](num_weights, self.step, length), np.int64)
        most = round(self.max_sparsity * num_weights)
        counts = counts[(counts <= most) & (counts < num_weights)]
        num_probes = len(counts) if self.placement == "grid" else min(asked, len(counts))
        return PathCounts(counts, midpoints(len(counts), num_probes))
