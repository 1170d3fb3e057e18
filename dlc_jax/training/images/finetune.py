"""The public function of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess import ImageCache
from dlc_jax.selection import kept_positions
from dlc_jax.training.folder import RunFolder
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.types import Dataset, RunResult, Selection


def finetune(
    encoder: Encoder,
    dataset: Dataset,
    kept: Selection | np.ndarray | Sequence[int] | None = None,
    *,
    test: Dataset | None = None,
    epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    milestones: tuple[float, ...] = (0.5, 0.75),
    weight_decay: float = 1e-5,
    momentum: float = 0.9,
    nesterov: bool = True,
    linear_probe: bool = False,
    augment: bool = True,
    dtype: str = "float32",
    test_every: int = 0,
    image_memory_gib: float = 8.0,
    image_size: int = 224,
    seed: int | None = None,
    mode: str = "default",
    on_corrupt: str = "error",
    cache: ImageCache | None = None,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> RunResult:
    """Trains the encoder with a new linear head on the kept samples, as PyTorch would.

    SGD with L2 in the gradient, step decay, mean cross-entropy of each batch's real samples, batch
    norm with torch's running statistics. The same seed gives bit-equal runs on the same machine.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`; it is not changed.
      dataset: What `kept` was selected from.
      kept: A `Selection`, positions in the data set, or None for all of it.
      test: Tested on after the last epoch, and used for nothing else; classes are matched by name.
      epochs: Passes over the kept samples; 0 only tests, with the new, untrained head.
      batch_size: Samples per step; the last batch of an epoch may hold fewer.
      learning_rate: Before the first milestone (with one epoch both come before it: 1/100).
      milestones: Fractions of the epochs after which the rate is divided by ten.
      weight_decay, momentum, nesterov: As in torch.optim.SGD, for every parameter.
      linear_probe: Whether to train the head alone, on features computed once.
      augment: Whether to train on random resized crops and flips, or on evaluation crops.
      dtype: What the encoder computes in, `float32` or `bfloat16`; weights stay float32.
      test_every: Epochs between tests; 0 tests after the last one only.
      image_memory_gib: Decoded images kept for random crops; others are decoded every epoch.
      image_size: Side of the images in pixels.
      seed: Seed of head, data order and augmentation; None takes that of the selection, or 0.
      mode: `default`, or `official` for the released code's decay (Q6) and normalisation (Q11).
      on_corrupt: `error`, or `skip` to leave unreadable test images out. An unreadable training
        image is always an error.
      cache: Where the decoded test images are kept, for later runs too.
      folder: Where metrics.jsonl, per_class_accuracy.csv, run.json and checkpoint/ go; a run that
        was stopped goes on from its last whole checkpoint there. None: nowhere.
      mesh: Devices, from `make_mesh`, that every batch is divided among; loss and batch norm are
        of the whole batch. None: the default device.
      progress: Whether to show bars on the terminal.
    Returns:
      Accuracies in percent, the history of all epochs, and the weights.
    Raises:
      ValueError: kept positions that are out of range, repeated or of another data set; a test
        class that training does not know; a loss that is not finite; a folder that holds another
        run, is in use or cannot be written to; a last batch of one sample where batch norm would
        see a single value; values out of range; an unreadable sample.
    Source: Jiang et al. 2025, section 5.
    """
    for name, value in (("dataset", dataset), ("test", test)):
        if not isinstance(value, Dataset) and (name, value) != ("test", None):
            raise checks.InputError(
                f"{name}: expected a Dataset, as from dlc.load_dataset(...), got {value!r}."
            )
    settings = FinetuneConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        milestones=tuple(np.atleast_1d(milestones).tolist()),
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        linear_probe=linear_probe,
        augment=augment,
        dtype=dtype,
        test_every=test_every,
        image_memory_gib=image_memory_gib,
    )
    positions = kept_positions(dataset, kept)
    if seed is None:
        seed = kept.seed if isinstance(kept, Selection) else 0
    finetuner = Finetuner(
        encoder,
        dataset,
        test,
        settings,
        image_size=image_size,
        mode=mode,
        on_corrupt=on_corrupt,
        cache=cache,
        mesh=mesh,
        progress=progress,
    )
    return finetuner.run(positions, seed, RunFolder(Path(folder)) if folder is not None else None)
