"""From operations and measured speeds to seconds, and when pruning has paid for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dlc_jax.planning.costs import Cost
from dlc_jax.planning.machine import Mesh, is_processor, num_here

FACTOR = 2.0  # that a prediction may be off by, either way


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
        cls, mesh: Mesh, flops_per_s: float, decode_seconds: float = 0.0, crop_seconds: float = 0.0
    ) -> Speeds:
        """Returns the speeds of a mesh, measured on one device and on one host."""
        if is_processor():  # its devices share its cores
            flops_per_s /= min(mesh.num_devices, num_here(local=True))
        hosts = mesh.num_hosts
        return cls(flops_per_s, decode_seconds / hosts, crop_seconds / hosts, is_processor())

    def seconds(self, cost: Cost) -> float:
        """Returns the expected seconds of a cost."""
        return self._both(
            cost.device_flops / self.flops_per_s,
            cost.decodes * self.decode_seconds + cost.crops * self.crop_seconds,
        )

    def training_seconds(self, flops: float, num_crops: float = 1.0) -> float:
        """Returns the seconds of one sample in an epoch.

        Args:
          flops: Operations that a device computes for it.
          num_crops: Number of crops that are cut of it.
        """
        return self._both(flops / self.flops_per_s, num_crops * self.crop_seconds)

    def _both(self, device: float, host: float) -> float:
        return device + host if self.one_after_the_other else max(device, host)


class Payback(NamedTuple):
    """What pruning saves at a keep fraction.

    Attributes:
      keep_fraction: Kept.
      saved_seconds: Seconds that one fine-tuning run saves against one on everything.
      epochs: Epochs of one run after which the time of pruning is won back.
      runs: Runs of all their epochs after which it is.
    """

    keep_fraction: float
    saved_seconds: float
    epochs: float
    runs: float


def paybacks(
    keep_fractions: Sequence[float],
    kept: Sequence[int],
    num_samples: int,
    epochs: int,
    pruning_seconds: float,
    sample_seconds: float,
) -> list[Payback]:
    """Returns when pruning has paid for itself.

    Args:
      keep_fractions, kept: Fractions and numbers of samples kept.
      num_samples: n.
      epochs: Epochs of a fine-tuning run.
      pruning_seconds: Seconds of all that it takes to know what to keep.
      sample_seconds: Seconds for one sample in an epoch.
    """
    found = []
    for keep_fraction, num in zip(keep_fractions, kept, strict=True):
        each = (num_samples - num) * sample_seconds  # saved by an epoch
        never = float("inf")
        won_back = pruning_seconds / each if each else never
        runs = won_back / epochs if epochs else never
        found.append(Payback(keep_fraction, each * epochs, won_back, runs))
    return found
