"""Every setting of LoRA fine-tuning, the paper's values by default."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from dlc_jax import expect
from dlc_jax.encoders.causal_model import DTYPES, TARGETS, Adapter
from dlc_jax.types import as_tuple, setting

OPTIMISERS = ("sgd", "adamw")
LOSS_ON = ("response", "text")
# Settings that change speed, memory and what is left on disk, but not the adapter.
_NOT_IN_WEIGHTS = (
    "rows_at_once",
    "packing",
    "rematerialise",
    "checkpoint_steps",
    "full_set",
    "keep_weights",
    "merge",
)
# Settings that earlier versions did not have: at their defaults a run is the one it was there.
_LATER = ("dropout", "loss_on", "drop_last")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How to fine-tune a language model.

    Attributes:
      rank: r of the change alpha / r * A @ B of every target projection, 1 or more.
      alpha: Above 0; see `rank`.
      targets: Projections that are changed, one or more of q_proj, k_proj, v_proj, o_proj,
        gate_proj, up_proj and down_proj. Where a converted model calls its linear layers otherwise,
        these seven stand for all in its blocks, and any of its own names can be given.
      epochs: Passes over the kept samples, 1 or more.
      batch_size: Samples per step, 1 or more; the last batch of an epoch may hold fewer.
      drop_last: Whether that short batch is left out, as by torch's `DataLoader(drop_last=True)`;
        an epoch has fewer steps then, and needs `batch_size` samples.
      loss_on: Tokens whose loss a step takes the mean over: `response`, or `text` for all but the
        first of each sample, as TRL's SFTTrainer does with plain text. Test losses are of
        responses either way.
      optimiser: `sgd` (the paper's) or `adamw`, as in torch.
      learning_rate: Above 0, after the warm-up. At the paper's, 7e-6, a few steps move next to
        nothing.
      warmup_steps: Steps, 0 or more, over which the rate grows from 0; then it falls to 0 as half
        a cosine.
      weight_decay: 0 or more; as in torch.
      momentum: In [0, 1), of `sgd`.
      dropout: In [0, 1). Probability that a step zeroes an input of lora_a, of each token, feature
        and projection by itself; the others are divided by 1 - dropout. As PEFT's `lora_dropout`,
        but JAX draws, by seed and step. Tests and the finished model have none.
      dtype: Type of the frozen weights, `float32`, `bfloat16` or `float16`; `finetune_lora` takes
        that of the model it is given.
      rows_at_once: Rows per program call, 1 or more; gradients of a step add up over calls.
      packing: Whether short samples share rows; the same steps with less padding.
      rematerialise: Whether activations of a block are computed again instead of kept.
      checkpoint_steps: Steps between checkpoints in the folder, 1 or more.
      full_set: Whether the stage `finetune` also trains on the whole set.
      keep_weights: Whether the folder of a finished run keeps its last checkpoint.
      merge: Whether the folder also gets merged/, the model with the change added.
    Source: Jiang et al. 2025, section 5; Hu et al. 2021, arXiv 2106.09685.

    Example: `dlc.finetune_lora(model, tokens, settings=dlc.LoraConfig(rank=16, packing=True))`.
    """

    rank: int = setting(8, "of the change to each projection")
    alpha: float = setting(16.0, "the change is multiplied by alpha / rank")
    targets: tuple[str, ...] = setting(TARGETS, "projections that are changed")
    epochs: int = setting(3, "passes over the kept set")
    batch_size: int = setting(32, "samples per step; the last, short batch counts as it is")
    drop_last: bool = setting(False, "leave the last, short batch of an epoch out")
    loss_on: str = setting("response", f"{' or '.join(LOSS_ON)}: tokens that the loss counts")
    optimiser: str = setting("sgd", f"{' or '.join(OPTIMISERS)}; adamw learns at small scale too")
    learning_rate: float = setting(7e-6, "after the warm-up; with adamw rather 1e-4 to 1e-3")
    warmup_steps: int = setting(100, "over which the rate grows from 0; then it falls as a cosine")
    weight_decay: float = setting(0.01, "as torch's SGD (in the gradient) or AdamW (apart) has it")
    momentum: float = setting(0.9, "of sgd")
    dropout: float = setting(0.0, "rate at which inputs of the change are zeroed in training")
    dtype: str = setting("bfloat16", f"of the frozen model: {', '.join(DTYPES)}")
    rows_at_once: int = setting(8, "rows per program call; gradients of a batch add up over calls")
    packing: bool = setting(False, "several samples in a row: the same steps with less padding")
    rematerialise: bool = setting(True, "compute activations twice instead of keeping them")
    checkpoint_steps: int = setting(100, "steps between checkpoints; one more after every epoch")
    full_set: bool = setting(True, "a sweep also trains on the whole set, once per seed")
    keep_weights: bool = setting(False, "keep the last checkpoint too, which has the momentum")
    merge: bool = setting(False, "also write the model with the change added, as a whole model")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_tuple(self.targets))
        if isinstance(self.alpha, numbers.Real):
            object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the adapter a run ends with."""
        values = dataclasses.asdict(self)
        usual = {f.name: f.default for f in dataclasses.fields(self) if f.name in _LATER}
        return {
            name: value
            for name, value in values.items()
            if name not in _NOT_IN_WEIGHTS and (name not in usual or value != usual[name])
        }

    @property
    def adapter(self) -> Adapter:
        """Which projections are changed."""
        return Adapter(self.rank, self.alpha, self.targets, float(self.dropout))

    def steps_per_epoch(self, num_samples: int) -> int:
        """Returns the steps that an epoch takes; ValueError where `drop_last` leaves none."""
        if not self.drop_last:
            return -(-num_samples // self.batch_size)
        if num_samples < self.batch_size:
            raise expect.InputError(
                f"lora.drop_last: True leaves no step of {num_samples} samples; expected False, or "
                f"lora.batch_size of at most {num_samples}, got {self.batch_size}."
            )
        return num_samples // self.batch_size

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        for name in ("rank", "epochs", "batch_size", "rows_at_once", "checkpoint_steps"):
            expect.integer(f"lora.{name}", getattr(self, name), 1)
        expect.integer("lora.warmup_steps", self.warmup_steps, 0)
        for name in ("weight_decay", "momentum", "dropout"):
            expect.at_least(f"lora.{name}", getattr(self, name), 0)
        for name in ("alpha", "learning_rate"):
            expect.at_least(f"lora.{name}", getattr(self, name), 0, exclusive=True)
        for name in ("momentum", "dropout"):
            expect.at_most(f"lora.{name}", getattr(self, name), 1, exclusive=True)
        expect.one_of("lora.optimiser", self.optimiser, OPTIMISERS)
        expect.one_of("lora.dtype", self.dtype, DTYPES)
        expect.one_of("lora.loss_on", self.loss_on, LOSS_ON)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise expect.InputError(
                f"lora.targets: expected one or more different names, got {self.targets}."
            )
        for target in self.targets:
            if not isinstance(target, str) or not target:
                raise expect.InputError(f"lora.targets: expected names, got {target!r}.")


def learning_rates(num_steps: int, learning_rate: float, warmup_steps: int) -> list[float]:
    """Returns the rate of every step: linear from 0, then half a cosine to 0.

    As `transformers.get_cosine_schedule_with_warmup`; its first step does not move anything.

    Args:
      num_steps: Steps of the whole run. A run shorter than the warm-up ends within it.
      learning_rate: At the end of the warm-up.
      warmup_steps: How long that is.
    """
    rising = [learning_rate * step / warmup_steps for step in range(min(warmup_steps, num_steps))]
    left = num_steps - warmup_steps
    passed = [step / left for step in range(left)]
    return rising + [learning_rate * 0.5 * (1 + math.cos(math.pi * part)) for part in passed]
