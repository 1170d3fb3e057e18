"""The public function of LoRA fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.distributed import Run, mesh_of
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.training.loop import train
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.tuner import LoraResult, LoraTuner
from dlc_jax.training.run_step import RunStep
from dlc_jax.types import Selection, overridden
from dlc_jax.workspace import Workspace


def finetune_lora(
    model: LanguageModel,
    data: Tokenised,
    kept: Selection | np.ndarray | Sequence[int] | None = None,
    *,
    test: Tokenised | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimiser: str | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    settings: LoraConfig = LoraConfig(),
    run: Run = Run(),
) -> LoraResult:
    """Trains low-rank changes of a language model's projections on the kept samples.

    The loss of a step is the mean over all response tokens of its samples. Adapter, gradients and
    optimiser are float32, whatever the model is in. The same seed gives the same adapter.

    Args:
      model: From `load_language_model`, without an adapter; it is not changed.
      data: From `tokenise`.
      kept: A `Selection`, positions in the data, or None for all of it.
      test: Its loss is measured after the last step, and used for nothing else.
      epochs, batch_size, optimiser, learning_rate: Instead of those in `settings`.
      seed: Seed of the adapter's start and of the data order; None takes the selection's, or 0.
      folder: Where adapter/ (as PEFT reads it), metrics.jsonl and run.json go; a run that was
        stopped resumes at its last whole checkpoint there, a finished one is read. None: that of
        `run`.
      settings: Size of the change, optimiser and schedule; see `LoraConfig`. Its `dtype` is not
        used: the model has one.
      run: Folder and bars; see `Run`. The devices are those that the model was loaded on, and
        another mesh is an error.
    Returns:
      The model with its adapter, the loss of the test set, and the history of all epochs.
    Raises:
      ValueError: kept positions that are out of range, repeated or of other data; tokens that the
        model does not have, by sample; a loss that is not finite; a folder that holds another run,
        is in use or cannot be written to; values out of range.
    Source: Hu et al. 2021, arXiv 2106.09685; Jiang et al. 2025, section 5.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> settings = dlc.LoraConfig(optimiser="adamw", learning_rate=0.01, warmup_steps=0)
      >>> result = dlc.finetune_lora(model, tokens, [0, 2], epochs=2, settings=settings)
      >>> first, last = [epoch["train_loss"] for epoch in result.history]
      >>> result.num_kept, last < first
      (2, True)
    """
    checks.is_a(LoraConfig, settings=settings)
    checks.is_a(Run, run=run)
    if run.mesh is not None and run.mesh.size > 1 and run.mesh != mesh_of(model.params):
        raise checks.InputError(
            "run.mesh: other devices than those of the model; expected None, or the mesh that "
            "load_language_model was given."
        )
    settings = overridden(
        settings,
        epochs=epochs,
        batch_size=batch_size,
        optimiser=optimiser,
        learning_rate=learning_rate,
        dtype=model.architecture.dtype,
    )
    run = overridden(run, folder=folder)
    tuner = LoraTuner(model, data, settings, test=test, progress=run.progress)
    if seed is None:
        seed = kept.seed if isinstance(kept, Selection) else 0
    positions = tuner.positions(kept)
    if run.path is None:
        return train(tuner, positions, seed)
    workspace = Workspace(run.path)
    step = RunStep(tuner, positions, seed, run.path, settings=dataclasses.asdict(settings))
    with workspace.held("folder"):
        workspace.ensure(step)
        tuner.complete(workspace)
    return tuner.read(run.path)
