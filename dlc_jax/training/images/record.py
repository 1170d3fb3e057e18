"""The public function of recording."""

from __future__ import annotations

from dlc_jax import checks
from dlc_jax.distributed import Run
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess import Images
from dlc_jax.training.images.recorder import Recorder, read_record
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
from dlc_jax.types import Conventions, Dataset, TrainingRecord, overridden
from dlc_jax.workspace import Workspace


def record_training(
    encoder: Encoder,
    images: Images | Dataset,
    *,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    settings: FinetuneConfig = FinetuneConfig(),
    record: RecordConfig = RecordConfig(),
    mode: str = "default",
    progress: bool | None = None,
    run: Run = Run(),
) -> TrainingRecord:
    """Fine-tunes on the whole data set and records what `score` makes training-based scores of.

    One run over the whole schedule serves forgetting, entropy, margin and least confidence, and is
    the first of the runs that EL2N and GraNd average over. The others have the same schedule and
    stop after the early epoch. Each run trains bit for bit as `finetune` does with its seed.

    Args:
      encoder: From `load_encoder`, or your own `Encoder`; it is not changed.
      images: All of it is trained on; with `Images` also how it is read: with `on_corrupt="skip"`
        without the unreadable ones.
      image_size, mode: See `finetune`.
      epochs, batch_size, learning_rate: Instead of those in `settings`.
      seed: Seed of the first run; the others count on from it.
      settings: How to fine-tune, for 1 epoch or more; see `FinetuneConfig`.
      record: How many runs, and the early epoch; see `RecordConfig`.
      progress: Instead of that in `run`.
      run: Folder, devices of this process, and bars; see `Run`. A call that was stopped resumes
        at the last whole checkpoint in the folder, and a finished one is read. It holds
        record.npz, and of each run seed_<seed>/metrics.jsonl.
    Raises:
      ValueError: a folder that holds another record, is in use or cannot be written to; an
        unreadable sample; a loss that is not finite; values out of range.
    Source: Toneva et al. 2019, arXiv 1812.05159; Coleman et al. 2020, arXiv 1906.11829; Paul et al.
      2021, arXiv 2107.07075.
    Example:
      >>> images = np.zeros((8, 32, 32, 3), np.uint8)
      >>> images[4:] = 255
      >>> dataset = dlc.array_dataset(images, ["dark"] * 4 + ["light"] * 4)
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> record = dlc.record_training(
      ...     encoder, dataset, image_size=32, epochs=2, record=dlc.RecordConfig(num_runs=1)
      ... )
      >>> record.correct.shape, record.probabilities.argmax(axis=1).tolist()
      ((2, 8), [0, 0, 0, 0, 1, 1, 1, 1])
    """
    checks.is_a(FinetuneConfig, settings=settings)
    checks.is_a(RecordConfig, record=record)
    checks.is_a(Run, run=run)
    recorder = Recorder(
        encoder,
        Images.of(images, image_size),
        overridden(settings, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate),
        record,
        seed=seed,
        conventions=Conventions.of(mode),
        run=overridden(run, progress=progress),
    )
    if run.path is None:
        return recorder.record(recorder.compute())
    workspace = Workspace(run.path)
    with workspace.held("folder"):
        workspace.ensure(recorder)
    return read_record(run.path)
