"""How often a run's network sees which samples, and what that takes to compute."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax.config import Config


class Cost(NamedTuple):
    """A part of a run.

    Attributes:
      stage: `score` or `finetune`.
      name: Which part of it.
      passes: How often every sample is seen; with runs on parts of the samples, by how many epochs.
      num_samples: Seen in all passes, each time counted.
      flops: Operations for all of them together.
      device_flops: Operations of the device that has most to do, padding included.
      decodes: Images that are decoded.
      crops: Random crops that are cut of decoded images.
      is_training: Whether it takes training steps.
    """

    stage: str
    name: str
    passes: int
    num_samples: int
    flops: int
    device_flops: int
    decodes: int = 0
    crops: int = 0
    is_training: bool = False

    def plus(self, other: Cost) -> Cost:
        """Returns both as one part."""
        return self._replace(
            passes=self.passes + other.passes,
            num_samples=self.num_samples + other.num_samples,
            flops=self.flops + other.flops,
            device_flops=self.device_flops + other.device_flops,
            decodes=self.decodes + other.decodes,
            crops=self.crops + other.crops,
        )


def num_kept(counts: Int64[np.ndarray, " c"], keep_fraction: float, least: int = 0) -> int:
    """Returns how many samples are kept of classes of these sizes.

    Args:
      counts: [c] samples of each class.
      keep_fraction: 1 keeps all.
      least: Samples that are kept of a class, if it has so many.
    """
    kept = np.maximum(np.rint(counts * keep_fraction), np.where(counts == 1, 1, least))
    return int(np.minimum(kept, counts).sum())


def kept_by_run(config: Config, counts: Int64[np.ndarray, " c"]) -> list[int]:
    """Returns the samples of every run of a sweep."""
    selection = config.selection
    groups = counts if selection.per_class else counts.sum(keepdims=True)
    return [num_kept(groups, cell.keep_fraction, selection.min_per_class) for cell in config.runs()]


def planned_stages(config: Config) -> tuple[str, ...]:
    """Returns what is planned: the stages that are asked for besides; all, if there are none."""
    others = {"score", "finetune"} & set(config.stages)
    return tuple(s for s in ("score", "finetune") if s in (others or {"score", "finetune"}))
