"""Fine-tuning on a whole data set, watched: what the training-based scores are made of."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.distributed import Run, processes
from dlc_jax.encoders import Encoder
from dlc_jax.files.array_files import read_npy, read_npz
from dlc_jax.files.json_files import NAME, parse_json
from dlc_jax.preprocess.images import Images
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
from dlc_jax.training.images.step import TrainState
from dlc_jax.training.loop import CHECKPOINT, SEEN, EpochSums, RunStep, train
from dlc_jax.training.optimiser import epoch_order
from dlc_jax.types import Conventions, Dataset, TrainingRecord, overridden
from dlc_jax.workspace import Workspace, Written, artefacts, records

RECORD = "record.npz"
_ARRAYS = {
    "correct": ("b", 2),
    "logits": ("f", 2),
    "early_logits": ("f", 3),
    "early_squared_norms": ("f", 2),
    "labels": ("i", 1),
    "ids": ("U", 1),
}
_FACTS = {
    "early_epoch": int,
    "batch_size": int,
    "class_names": [str],
    "seconds": float,
    "num_epochs": int,
    "skipped": {NAME: str},
}


class Recorder:
    """Runs on a whole data set, and what they showed of every sample: a step of a folder's own.

    The first run takes the whole schedule; the others end after the early epoch.

    Args: see `record_training`; `say` takes a line for each checkpoint that is damaged.
    Raises:
      ValueError: see `record_training`.
    """

    name = records.RUN
    kind = "training record"
    stage = "score"
    files: tuple[str, ...] = (RECORD,)
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}

    def __init__(
        self,
        encoder: Encoder,
        images: Images,
        settings: FinetuneConfig,
        record: RecordConfig,
        *,
        seed: int,
        conventions: Conventions,
        run: Run = Run(),
        say: Callable[[str], None] = expect.show,
    ):
        record.check()
        # a finished run keeps its weights until the others are finished too
        settings = dataclasses.replace(settings, keep_weights=True)
        self._finetuner = Finetuner(encoder, images, None, settings, conventions, run)
        if settings.epochs == 0:
            raise expect.InputError("finetune.epochs: recording needs 1 or more, got 0.")
        self._images, self._dataset, self._root, self._say = images, images.dataset, run.path, say
        self.num_epochs = int(settings.epochs)  # of the first run
        self._batch_size = int(settings.batch_size)
        self.early_epoch = max(1, round(record.early_fraction * settings.epochs))
        num_runs = record.num_runs or conventions.num_runs
        expect.seed(seed)
        expect.seed(seed + num_runs - 1, "seed of the last run")
        self.seeds = range(int(seed), int(seed) + num_runs)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that decides the record."""
        return {
            "made_of": self._finetuner.made_of,
            "shared": self._finetuner.fingerprint,
            "seeds": [self.seeds.start, self.seeds.stop],
            "early_epoch": self.early_epoch,
        }

    def compute(self, scratch: Path | None = None) -> WatchedRuns:
        """Trains, in all processes of the mesh; each run keeps its state in a folder below."""
        start = time.perf_counter()
        positions = np.arange(len(self._dataset))
        skipped: dict[str, str] = {}
        if self._images.on_corrupt == "skip":
            positions, skipped = self._finetuner.data.readable()
        seconds = time.perf_counter() - start
        runs = []
        for seed in self.seeds:
            folder = None if self._root is None else self._root / f"seed_{seed}"
            seen = folder / SEEN if folder is not None and processes.is_first() else None
            last = self.num_epochs if seed == self.seeds.start else self.early_epoch
            watch = _Watch(self._finetuner, positions, seed, self.early_epoch, last, seen)
            if folder is None:
                result = train(self._finetuner, positions, seed, watch=watch)
            else:
                step = RunStep(self._finetuner, positions, seed, folder, say=self._say, watch=watch)
                result = Workspace(folder, self._say).make(step)
            seconds += result.seconds
            runs.append(watch)
        return positions, skipped, runs, seconds

    def record(self, runs: WatchedRuns) -> TrainingRecord:
        """Returns the record of runs that this process has seen, or that are in its folder."""
        positions, skipped, watches, seconds = runs
        epochs, early = range(1, self.num_epochs + 1), f"epoch_{self.early_epoch}"
        return TrainingRecord(
            correct=np.stack([watches[0].get(f"correct_{epoch}") for epoch in epochs]),
            logits=watches[0].get(f"epoch_{self.num_epochs}_logits"),
            early_logits=np.stack([watch.get(f"{early}_logits") for watch in watches]),
            early_squared_norms=np.stack([w.get(f"{early}_squared_norms") for w in watches]),
            early_epoch=self.early_epoch,
            batch_size=self._batch_size,
            labels=self._dataset.labels[positions],
            ids=self._dataset.ids[positions],
            class_names=self._dataset.class_names,
            seconds=seconds,
            num_epochs=self.num_epochs + (len(watches) - 1) * self.early_epoch,
            skipped=skipped,
        )

    def write(self, root: Path, runs: WatchedRuns) -> Written:
        """Writes record.npz."""
        record = self.record(runs)
        facts = json.dumps({name: getattr(record, name) for name in _FACTS})
        arrays = {name: getattr(record, name) for name in _ARRAYS}
        with artefacts.atomic(root / RECORD) as file:
            np.savez(file, allow_pickle=False, facts=np.array(facts), **arrays)
        return Written(self.files, seconds=record.seconds)

    @property
    def obsolete(self) -> tuple[str, ...]:
        return tuple(f"seed_{seed}/{name}" for seed in self.seeds for name in (CHECKPOINT, SEEN))


@dataclasses.dataclass(frozen=True, eq=False)
class _Watch:
    """Keeps what a run shows of every sample, in arrays that are there whole or not at all.

    Attributes:
      finetuner, positions, seed: Trainer, samples and seed of the run.
      early_epoch, last_epoch: Epochs after which logits are looked at; the run ends with the last.
      folder: Where arrays are kept; None: in memory.
      arrays: Those in memory, by name.
    """

    finetuner: Finetuner
    positions: Int64[np.ndarray, " n"]
    seed: int
    early_epoch: int
    last_epoch: int
    folder: Path | None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> list[int]:
        return [self.early_epoch, self.last_epoch]

    def __call__(self, epoch: int, state: TrainState, sums: EpochSums) -> None:
        order = np.argsort(epoch_order(self.positions, self.seed, epoch))  # positions ascend
        correct = np.frombuffer(sums["correct"].encode(), np.uint8) == ord("1")
        self._put(f"correct_{epoch}", correct[order])
        if epoch in (self.early_epoch, self.last_epoch):
            logits, squared_norms = self.finetuner.outputs(state, self.positions)
            self._put(f"epoch_{epoch}_logits", logits)
            self._put(f"epoch_{epoch}_squared_norms", squared_norms)

    def _put(self, name: str, array: np.ndarray) -> None:
        if self.folder is None:
            self.arrays[name] = array
            return
        with artefacts.atomic(self.folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)

    def get(self, name: str) -> np.ndarray:
        if self.folder is None:
            return self.arrays[name]
        return read_npy(self.folder / f"{name}.npy")


# what runs train on; samples that are left out, id: why; what each run showed; seconds of all
WatchedRuns = tuple[Int64[np.ndarray, " n"], dict[str, str], list[_Watch], float]


def read_record(folder: Path, ids: np.ndarray | None = None) -> TrainingRecord:
    """Reads the finished record in a folder.

    Args:
      folder: Folder of the record.
      ids: [n] samples that it has to be of; None: any.
    Raises:
      ValueError: there is none, or it is of other samples than these.
    """
    path = folder / RECORD
    if not path.exists():
        raise expect.InputError(f"{path}: not there; record a training first.")
    try:
        expected = _ARRAYS | {"facts": ("U", 0)}
        arrays: dict[str, Any] = {**read_npz(path, expected)}
        facts = parse_json(str(arrays.pop("facts")), _FACTS, path)
        facts["class_names"] = tuple(facts["class_names"])
        record = TrainingRecord(**arrays, **{name: facts[name] for name in _FACTS})
        num_samples, num_classes = len(record.ids), len(record.class_names)
        num_runs = len(record.early_logits)
        for name, shape in (
            ("correct", (len(record.correct), num_samples)),
            ("logits", (num_samples, num_classes)),
            ("early_logits", (num_runs, num_samples, num_classes)),
            ("early_squared_norms", (num_runs, num_samples)),
            ("labels", (num_samples,)),
        ):
            if (found := getattr(record, name).shape) != shape:
                raise expect.InputError(f"{path}: {name} is {found}, expected {shape}.")
    except expect.InputError as error:
        raise expect.InputError(
            f"{path}: not a training record: {error} Delete it to record again."
        ) from error
    if ids is not None and not np.array_equal(record.ids, ids):
        raise expect.InputError(f"{path}: is of other samples than the scores.")
    return record


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
    expect.is_a(FinetuneConfig, settings=settings)
    expect.is_a(RecordConfig, record=record)
    expect.is_a(Run, run=run)
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
