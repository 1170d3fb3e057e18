"""Every setting of a fine-tuning run, the paper's values by default."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlc_jax import expect
from dlc_jax.probes import DTYPES
from dlc_jax.types import as_tuple, setting

# Settings that change speed, memory and what is reported, but not the weights.
_NOT_IN_WEIGHTS = ("test_every", "full_set", "keep_weights", "image_memory_gib")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
      epochs: Passes over the kept samples, 0 or more; 0 only tests, with the new, untrained head.
      batch_size: Samples per step, 1 or more; the last batch of an epoch may hold fewer.
      learning_rate: Above 0; before the first milestone (with one epoch both of the default ones
        come before it: 1/100).
      milestones: Fractions of the epochs, each in (0, 1], or a single one: after each of them the
        rate is divided by ten.
      weight_decay: 0 or more; as in torch.optim.SGD, of every parameter.
      momentum: In [0, 1), as in torch.optim.SGD.
      nesterov: Whether momentum is Nesterov's, as in torch.optim.SGD; it must then be above 0.
      linear_probe: Whether to train the head alone, on features computed once.
      augment: Whether to train on random resized crops and flips, or on evaluation crops.
      dtype: What the encoder computes in, `float32` or `bfloat16`; weights stay float32.
      test_every: Epochs between tests, 0 or more; 0 tests after the last one only.
      full_set: Whether the stage `finetune` also trains on the whole set.
      keep_weights: Whether the folder of a finished run keeps its last checkpoint.
      image_memory_gib: Decoded images kept for random crops, in GiB, 0 or more; others are decoded
        again in every epoch.
    Source: Jiang et al. 2025, section 5; the released finetune.py.

    Example: `dlc.finetune(encoder, dataset, settings=dlc.FinetuneConfig(linear_probe=True))`.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", as_tuple(self.milestones))

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the weights a run ends with."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _NOT_IN_WEIGHTS}

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        expect.optimiser("finetune", self)
        expect.one_of("finetune.dtype", self.dtype, DTYPES)
        expect.integer("finetune.test_every", self.test_every, 0)
        expect.at_least("finetune.image_memory_gib", self.image_memory_gib, 0)


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What to record of fine-tuning on the whole data set; see `record_training`.

    Attributes:
      num_runs: How many runs, 1 or more; None is 3, in mode `official` 10.
      early_fraction: Share of the epochs after which EL2N and GraNd look, in (0, 1]; the nearest
        epoch, at least 1.
    Source: Paul et al. 2021, arXiv 2107.07075: 10 runs, early in training.

    Example: `dlc.record_training(encoder, dataset, record=dlc.RecordConfig(num_runs=10))`.
    """

    num_runs: int | None = setting(None, "runs that el2n and grand average over; None: by mode")
    early_fraction: float = setting(0.2, "of the epochs, after which el2n and grand look")

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        if self.num_runs is not None:
            expect.integer("record.num_runs", self.num_runs, 1)
        expect.at_least("record.early_fraction", self.early_fraction, 0, exclusive=True)
        expect.at_most("record.early_fraction", self.early_fraction, 1)
