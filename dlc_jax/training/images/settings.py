"""Every setting of a fine-tuning run, the paper's values by default."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlc_jax import checks
from dlc_jax.probes import DTYPES
from dlc_jax.types import setting

# Settings that change speed, memory and what is reported, but not the weights.
_NOT_IN_WEIGHTS = ("test_every", "full_set", "keep_weights", "image_memory_gib")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Source: Jiang et al. 2025, section 5; the released finetune.py.
    """

    epochs: int = setting(50, "passes over the kept set; 0 only tests, with an untrained head")
    batch_size: int = setting(128, "samples per step; the last, short batch counts as it is")
    learning_rate: float = setting(1e-3, "before the first milestone")
    milestones: tuple[float, ...] = setting(
        (0.5, 0.75), "fractions of the epochs after which the learning rate is divided by 10"
    )
    weight_decay: float = setting(1e-5, "L2 in the gradient, of every parameter, as torch's SGD")
    momentum: float = setting(0.9, "of SGD")
    nesterov: bool = setting(True, "Nesterov momentum, as torch defines it")
    linear_probe: bool = setting(False, "train the head only, on features computed once")
    augment: bool = setting(True, "random resized crops and flips; False: evaluation crops")
    dtype: str = setting("float32", f"of the network: {', '.join(DTYPES)}; weights stay float32")
    test_every: int = setting(0, "epochs between tests; 0: only after the last")
    full_set: bool = setting(True, "a sweep also trains on the whole set, once per seed")
    keep_weights: bool = setting(True, "keep the last checkpoint of a finished run")
    image_memory_gib: float = setting(8.0, "decoded images kept to be cropped; others decode anew")

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the weights a run ends with."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _NOT_IN_WEIGHTS}

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        checks.optimiser("finetune", self)
        checks.one_of("finetune.dtype", self.dtype, DTYPES)
        checks.integer("finetune.test_every", self.test_every)
        checks.at_least("finetune.test_every", self.test_every, 0)
        checks.at_least("finetune.image_memory_gib", self.image_memory_gib, 0)


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What to record of fine-tuning on the whole data set; see `record_training`.

    Source: Paul et al. 2021, arXiv 2107.07075: 10 runs, early in training.
    """

    num_runs: int | None = setting(None, "runs that el2n and grand average over; None: by mode")
    early_fraction: float = setting(0.2, "of the epochs, after which el2n and grand look")

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        if self.num_runs is not None:
            checks.integer("record.num_runs", self.num_runs)
            checks.at_least("record.num_runs", self.num_runs, 1)
        checks.at_least("record.early_fraction", self.early_fraction, 0, exclusive=True)
        checks.at_most("record.early_fraction", self.early_fraction, 1)
