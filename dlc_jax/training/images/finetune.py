"""The public function of fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import checks
from dlc_jax.distributed import Run
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess import Images, check_dataset
from dlc_jax.selection import kept_positions
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.loop import train
from dlc_jax.training.run_step import RunStep
from dlc_jax.types import Conventions, Dataset, RunResult, Selection, overridden
from dlc_jax.workspace import Workspace


def finetune(
    encoder: Encoder,
    images: Images | Dataset,
    kept: Selection | np.ndarray | Sequence[int] | None = None,
    *,
    test: Dataset | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    settings: FinetuneConfig = FinetuneConfig(),
    mode: str = "default",
    run: Run = Run(),
) -> RunResult:
    """Trains the encoder with a new linear head on the kept samples, as PyTorch would.

    SGD with L2 in the gradient, step decay, mean cross-entropy of each batch's real samples, batch
    norm with torch's running statistics. The same seed gives bit-equal runs on the same machine.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`; it is not changed.
      images: What `kept` was selected from; with `Images` also how it is read, and the test images
        with it. An unreadable training image is always an error. A cache is for the test images.
      kept: A `Selection`, positions in the data set, or None for all of it.
      test: Tested on after the last epoch, and used for nothing else; classes are matched by name.
      image_size: Side of the images in pixels; None: that of `images`, 224 of a data set.
      epochs, batch_size, learning_rate: Instead of those in `settings`.
      seed: Seed of head, data order and augmentation; None takes that of the selection, or 0.
      folder: Where metrics.jsonl, per_class_accuracy.csv, run.json and checkpoint/ go; a run that
        was stopped resumes at its last whole checkpoint there. None: that of `run`.
      settings: Optimiser, schedule, augmentation and number type; see `FinetuneConfig`.
      mode: `default`, or `official` for the released code's decay (Q6) and normalisation (Q11).
      run: Devices, bars and folder; see `Run`. Every batch is divided among the devices; loss and
        batch norm are of the whole batch.
    Returns:
      Accuracies in percent, the history of all epochs, and the weights.
    Raises:
      ValueError: kept positions that are out of range, repeated or of another data set; a test
        class that training does not know; a loss that is not finite; a folder that holds another
        run, is in use or cannot be written to; a last batch of one sample where batch norm would
        see a single value; values out of range; an unreadable sample.
    Source: Jiang et al. 2025, section 5.
    Example:
      >>> images = np.zeros((8, 32, 32, 3), np.uint8)
      >>> images[4:] = 255
      >>> dataset = dlc.array_dataset(images, ["dark"] * 4 + ["light"] * 4)
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> kept = [0, 1, 6, 7]
      >>> result = dlc.finetune(encoder, dataset, kept, test=dataset, image_size=32, epochs=2)
      >>> result.num_kept, result.test_accuracy
      (4, 100.0)
    """
    images = Images.of(images, image_size)
    if test is not None:
        check_dataset("test", test)
    checks.is_a(FinetuneConfig, settings=settings)
    checks.is_a(Run, run=run)
    settings = overridden(
        settings, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate
    )
    run = overridden(run, folder=folder)
    positions = kept_positions(images.dataset, kept)
    if seed is None:
        seed = kept.seed if isinstance(kept, Selection) else 0
    finetuner = Finetuner(encoder, images, test, settings, Conventions.of(mode), run)
    if run.path is None:
        return train(finetuner, positions, seed)
    workspace = Workspace(run.path)
    step = RunStep(finetuner, positions, seed, run.path, settings=dataclasses.asdict(settings))
    with workspace.held("folder"):
        return workspace.make(step)
