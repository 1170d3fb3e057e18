"""How often a run's network sees which samples, what that takes to compute, and how long."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax.config import Config
from dlc_jax.planning.machine import MeshSize, is_processor, num_here
from dlc_jax.selection import Cell
from dlc_jax.selection.methods import released_draws


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
        summed = ("passes", "num_samples", "flops", "device_flops", "decodes", "crops")
        return self._replace(
            **{name: getattr(self, name) + getattr(other, name) for name in summed}
        )


class Speeds(NamedTuple):
    """What was measured here, as it is on the devices and hosts that are planned for.

    Attributes:
      flops_per_s: Operations per second of one device, while all others work too.
      decode_seconds, crop_seconds: Seconds for an image, all hosts together.
      one_after_the_other: Whether device and host take turns, being the same processor.
    """

    flops_per_s: float
    decode_seconds: float
    crop_seconds: float
    one_after_the_other: bool

    @classmethod
    def of(
        cls,
        mesh: MeshSize,
        flops_per_s: float,
        decode_seconds: float = 0.0,
        crop_seconds: float = 0.0,
    ) -> Speeds:
        """Returns the speeds of a mesh, measured on one device and on one host."""
        if is_processor():  # its devices share its cores
            flops_per_s /= min(mesh.num_devices, num_here(local=True))
        hosts = mesh.num_hosts
        return cls(flops_per_s, decode_seconds / hosts, crop_seconds / hosts, is_processor())

    def seconds(self, cost: Cost) -> float:
        """Returns the expected seconds of a cost."""
        device = cost.device_flops / self.flops_per_s
        host = cost.decodes * self.decode_seconds + cost.crops * self.crop_seconds
        return device + host if self.one_after_the_other else max(device, host)


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
    known = config.conventions

    def kept(cell: Cell) -> int:
        if known.draws_as_released and isinstance(cell.split, float):  # which rounds the halves
            draws = [released_draws(n, cell.split, cell.keep_fraction) for n in groups.tolist()]
            return sum(easy + hard for _, easy, hard in draws)
        return num_kept(groups, cell.keep_fraction, selection.min_per_class)

    return [kept(cell) for cell in config.runs()]


def planned_stages(config: Config) -> tuple[str, ...]:
    """Returns what is planned: the stages that are asked for besides; all, if there are none."""
    others = {"score", "finetune"} & set(config.stages)
    return tuple(s for s in ("score", "finetune") if s in (others or {"score", "finetune"}))
