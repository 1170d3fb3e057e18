"""The public function of LoRA fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.encoders.projection import TARGETS
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.tuner import LoraResult, LoraTuner
from dlc_jax.types import Selection


def finetune_lora(
    model: LanguageModel,
    data: Tokenised,
    kept: Selection | np.ndarray | Sequence[int] | None = None,
    *,
    test: Tokenised | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    targets: tuple[str, ...] = TARGETS,
    epochs: int = 3,
    batch_size: int = 32,
    optimiser: str = "sgd",
    learning_rate: float = 7e-6,
    warmup_steps: int = 100,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    rows_at_once: int = 8,
    packing: bool = False,
    rematerialise: bool = True,
    checkpoint_steps: int = 100,
    seed: int | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> LoraResult:
    """Trains low-rank changes of a language model's projections on the kept samples.

    The loss of a step is the mean over all response tokens of its samples. Adapter, gradients and
    optimiser are float32, whatever the model is in. The same seed gives the same adapter.

    Args:
      model: From `load_language_model`, without an adapter; it is not changed.
      data: From `tokenise`.
      kept: A `Selection`, positions in the data, or None for all of it.
      test: Its loss is measured after the last step, and used for nothing else.
      rank, alpha, targets: Of the change: alpha / rank * A @ B of every target projection.
      epochs: Passes over the kept samples.
      batch_size: Samples per step; the last batch of an epoch may hold fewer.
      optimiser: `sgd` (the paper's) or `adamw`, as in torch.
      learning_rate: After the warm-up. At the paper's, 7e-6, a few steps move next to nothing.
      warmup_steps: Over which it grows from 0; then it falls to 0 as half a cosine.
      weight_decay, momentum: As in torch; momentum of `sgd`.
      rows_at_once: Rows per program call; gradients of a step add up over calls.
      packing: Whether short samples share rows; the same steps with less padding.
      rematerialise: Whether activations of a block are computed again instead of kept.
      checkpoint_steps: Steps between checkpoints in `folder`.
      seed: Of the adapter's start and of the data order; None takes the selection's, or 0.
      folder: Where adapter/ (as PEFT reads it), metrics.jsonl and run.json go; a run that was
        stopped goes on from its last whole checkpoint there, a finished one is read. None: nowhere.
      progress: Whether to show bars on the terminal.
    Returns:
      The model with its adapter, the loss of the test set, and the history of all epochs.
    Raises:
      ValueError: kept positions that are out of range, repeated or of other data; tokens that the
        model does not have, by sample; a loss that is not finite; a folder that holds another run,
        is in use or cannot be written to; values out of range.
    Source: Hu et al. 2021, arXiv 2106.09685; Jiang et al. 2025, section 5.
    """
    settings = LoraConfig(
        rank=rank,
        alpha=float(alpha),
        targets=tuple(targets),
        epochs=epochs,
        batch_size=batch_size,
        optimiser=optimiser,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        momentum=momentum,
        dtype=model.architecture.dtype,
        rows_at_once=rows_at_once,
        packing=packing,
        rematerialise=rematerialise,
        checkpoint_steps=checkpoint_steps,
    )
    tuner = LoraTuner(model, data, settings, test=test, progress=progress)
    if seed is None:
        seed = kept.seed if isinstance(kept, Selection) else 0
    where = None if folder is None else tuner.folder(Path(folder))
    return tuner.run(tuner.positions(kept), seed, where)
