"""The public function of recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess import ImageCache
from dlc_jax.training.images.recorder import Recorder
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
from dlc_jax.types import Dataset, TrainingRecord


def record_training(
    encoder: Encoder,
    dataset: Dataset,
    *,
    num_runs: int | None = None,
    early_fraction: float = 0.2,
    seed: int = 0,
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
    image_memory_gib: float = 8.0,
    image_size: int = 224,
    mode: str = "default",
    on_corrupt: str = "error",
    cache: ImageCache | None = None,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> TrainingRecord:
    """Fine-tunes on the whole data set and records what `score` makes training-based scores of.

    One run over the whole schedule serves forgetting, entropy, margin and least confidence, and is
    the first of the runs that EL2N and GraNd average over. The others have the same schedule and
    stop after the early epoch. Each run trains bit for bit as `finetune` does with its seed.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`; it is not changed.
      dataset: All of it is trained on.
      num_runs: How many runs; None is 3, in mode `official` 10.
      early_fraction: Of the epochs, in (0, 1]; the early epoch is the nearest one, at least 1.
      seed: Of the first run; the others count on from it.
      epochs: Of the whole schedule, 1 or more.
      batch_size, learning_rate, milestones, weight_decay, momentum, nesterov, linear_probe,
        augment, dtype, image_memory_gib, image_size, mode: See `finetune`.
      on_corrupt: `error`, or `skip` to leave unreadable images out and list them.
      cache: Where decoded evaluation crops are kept.
      folder: Where the record is kept; a call that was stopped goes on from the last whole
        checkpoint there, and a finished one is read. It holds record.npz, and of each run
        seed_<seed>/metrics.jsonl. None: nowhere.
      mesh: Devices of this process, as for `finetune`.
      progress: Whether to show bars on the terminal.
    Raises:
      ValueError: a folder that holds another record, is in use or cannot be written to; an
        unreadable sample; a loss that is not finite; values out of range.
    Source: Toneva et al. 2019, arXiv 1812.05159; Coleman et al. 2020, arXiv 1906.11829; Paul et al.
      2021, arXiv 2107.07075.
    """
    if not isinstance(dataset, Dataset):
        raise checks.InputError(
            f"dataset: expected a Dataset, as from dlc.load_dataset(...), got {dataset!r}."
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
        image_memory_gib=image_memory_gib,
    )
    recorder = Recorder(
        encoder,
        dataset,
        settings,
        RecordConfig(num_runs, early_fraction),
        seed=seed,
        image_size=image_size,
        mode=mode,
        on_corrupt=on_corrupt,
        cache=cache,
        mesh=mesh,
        progress=progress,
    )
    record = recorder.run(Path(folder) if folder is not None else None)
    assert record is not None  # there is no other process to help
    return record
