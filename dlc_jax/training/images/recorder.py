"""Fine-tuning on a whole data set, watched: what the training-based scores are made of."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.checks.escaping import show
from dlc_jax.distributed import Run, processes
from dlc_jax.encoders import Encoder
from dlc_jax.files import array_files
from dlc_jax.files.array_files import Expected
from dlc_jax.files.json_files import NAME, parse_json
from dlc_jax.preprocess import Images
from dlc_jax.training.folder import CHECKPOINT, SEEN
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
from dlc_jax.training.images.step import TrainState
from dlc_jax.training.loop import EpochSums, train
from dlc_jax.training.order import epoch_order
from dlc_jax.training.run_step import RunStep
from dlc_jax.types import Conventions, TrainingRecord
from dlc_jax.workspace import Workspace, Written, artefacts, records

RECORD = "record.npz"
_ARRAYS = {
    "correct": Expected("b", 2),
    "logits": Expected("f", 2),
    "early_logits": Expected("f", 3),
    "early_squared_norms": Expected("f", 2),
    "labels": Expected("i", 1),
    "ids": Expected("U", 1),
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
    """Runs on a whole data set, and what they showed of every sample.

    The first run takes the whole schedule; the others end after the early epoch.

    Args: see `record_training`.
    Raises:
      ValueError: see `record_training`.
    """

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
    ):
        record.check()
        # a finished run keeps its weights until the others are finished too
        settings = dataclasses.replace(settings, keep_weights=True)
        self._finetuner = Finetuner(encoder, images, None, settings, conventions, run)
        if settings.epochs == 0:
            raise checks.InputError("finetune.epochs: recording needs 1 or more, got 0.")
        self._images, self._dataset, self._settings = images, images.dataset, settings
        self.early_epoch = max(1, round(record.early_fraction * settings.epochs))
        num_runs = record.num_runs or conventions.num_runs
        checks.seed(seed)
        checks.seed(seed + num_runs - 1, "seed of the last run")
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

    @property
    def num_epochs(self) -> int:
        """Number of epochs of the first run."""
        return int(self._settings.epochs)

    def run(self, root: Path | None = None, say: Callable[[str], None] = show) -> WatchedRuns:
        """Trains, in all processes of the mesh.

        Args:
          root: Folder below which every run keeps its state; None: nowhere.
          say: Takes a line for each checkpoint that is damaged.
        """
        start = time.perf_counter()
        positions = np.arange(len(self._dataset))
        skipped: dict[str, str] = {}
        if self._images.on_corrupt == "skip":
            positions, skipped = self._finetuner.readable()
        seconds = time.perf_counter() - start
        runs = []
        for seed in self.seeds:
            folder = None if root is None else root / _run_name(seed)
            seen = _Seen({}, folder / SEEN if folder is not None and processes.is_first() else None)
            last = self._settings.epochs if seed == self.seeds.start else self.early_epoch
            watch = _Watch(self._finetuner, positions, seed, self.early_epoch, last, seen)
            if folder is None:
                result = train(self._finetuner, positions, seed, watch=watch)
            else:
                step = RunStep(self._finetuner, positions, seed, folder, say=say, watch=watch)
                result = Workspace(folder, say).make(step)
            seconds += result.seconds
            runs.append(seen)
        return WatchedRuns(positions, skipped, runs, seconds)

    def record(self, runs: WatchedRuns) -> TrainingRecord:
        """Returns the record of runs that this process has seen, or that are in its folder."""
        epochs = range(1, self._settings.epochs + 1)
        early = f"epoch_{self.early_epoch}"
        seen = runs.seen
        return TrainingRecord(
            correct=np.stack([seen[0].get(f"correct_{epoch}") for epoch in epochs]),
            logits=seen[0].get(f"epoch_{self._settings.epochs}_logits"),
            early_logits=np.stack([some.get(f"{early}_logits") for some in seen]),
            early_squared_norms=np.stack([some.get(f"{early}_squared_norms") for some in seen]),
            early_epoch=self.early_epoch,
            batch_size=int(self._settings.batch_size),
            labels=self._dataset.labels[runs.positions],
            ids=self._dataset.ids[runs.positions],
            class_names=self._dataset.class_names,
            seconds=runs.seconds,
            num_epochs=int(self._settings.epochs) + (len(seen) - 1) * self.early_epoch,
            skipped=runs.skipped,
        )


class WatchedRuns(NamedTuple):
    """Runs of a record.

    Attributes:
      positions: [n] samples that they train on.
      skipped: Samples that are left out, id: why.
      seen: What each run showed.
      seconds: Time of all.
    """

    positions: Int64[np.ndarray, " n"]
    skipped: dict[str, str]
    seen: list[_Seen]
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class RecordStep:
    """A training record and the runs that it is made of, in a folder of their own."""

    recorder: Recorder
    root: Path
    say: Callable[[str], None] = show

    name = records.RUN
    kind = "training record"
    stage = "score"
    files = (RECORD,)
    optional = ()

    @property
    def key(self) -> dict[str, Any]:
        return self.recorder.key

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    def compute(self, scratch: Path | None) -> WatchedRuns:
        return self.recorder.run(self.root, self.say)

    def write(self, root: Path, runs: WatchedRuns) -> Written:
        _write(root / RECORD, self.recorder.record(runs))
        return Written(self.files, seconds=runs.seconds)

    @property
    def obsolete(self) -> tuple[str, ...]:
        names = (CHECKPOINT, SEEN)
        return tuple(f"{_run_name(seed)}/{n}" for seed in self.recorder.seeds for n in names)

    @property
    def seconds(self) -> float:
        """Time that the record took, once it is written."""
        record = records.read(self.root, self.name)
        return 0.0 if record is None else record.seconds

    def read(self) -> TrainingRecord:
        """Returns the record that was written."""
        record = _read(self.root / RECORD)
        assert record is not None  # it was made
        return record


class _Seen(NamedTuple):
    """Arrays by name, in memory or in a folder, where each is whole or not there at all."""

    arrays: dict[str, np.ndarray]
    folder: Path | None

    def put(self, name: str, array: np.ndarray) -> None:
        if self.folder is None:
            self.arrays[name] = array
            return
        with artefacts.atomic(self.folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)

    def get(self, name: str) -> np.ndarray:
        if self.folder is None:
            return self.arrays[name]
        return array_files.read_npy(self.folder / f"{name}.npy")


@dataclasses.dataclass(frozen=True, eq=False)
class _Watch:
    """Keeps what a run shows of every sample.

    Attributes:
      finetuner, positions, seed: Trainer, samples and seed of the run.
      early_epoch, last_epoch: Epochs after which logits are looked at; the run ends with the last.
      seen: Where it is kept.
    """

    finetuner: Finetuner
    positions: Int64[np.ndarray, " n"]
    seed: int
    early_epoch: int
    last_epoch: int
    seen: _Seen

    @property
    def key(self) -> list[int]:
        return [self.early_epoch, self.last_epoch]

    def __call__(self, epoch: int, state: TrainState, sums: EpochSums) -> None:
        order = np.argsort(epoch_order(self.positions, self.seed, epoch))  # positions ascend
        correct = np.frombuffer(sums["correct"].encode(), np.uint8) == ord("1")
        self.seen.put(f"correct_{epoch}", correct[order])
        if epoch in (self.early_epoch, self.last_epoch):
            logits, squared_norms = self.finetuner.outputs(state, self.positions)
            self.seen.put(f"epoch_{epoch}_logits", logits)
            self.seen.put(f"epoch_{epoch}_squared_norms", squared_norms)


def _run_name(seed: int) -> str:
    return f"seed_{seed}"


def _write(path: Path, record: TrainingRecord) -> None:
    facts = json.dumps({name: getattr(record, name) for name in _FACTS})
    arrays = {name: getattr(record, name) for name in _ARRAYS}
    with artefacts.atomic(path) as file:
        np.savez(file, allow_pickle=False, facts=np.array(facts), **arrays)


def _read(path: Path) -> TrainingRecord | None:
    """Returns the record; None if there is none."""
    if not path.exists():
        return None
    try:
        fields: dict[str, Any] = {
            **array_files.read_npz(path, _ARRAYS | {"facts": Expected("U", 0)})
        }
        facts = parse_json(str(fields.pop("facts")), _FACTS, path)
        fields |= {name: facts[name] for name in _FACTS}
        record = TrainingRecord(**fields | {"class_names": tuple(facts["class_names"])})
        _check_lengths(path, record)
    except checks.InputError as error:
        raise checks.InputError(
            f"{path}: not a training record: {error} Delete it to record again."
        ) from error
    return record


def _check_lengths(path: Path, record: TrainingRecord) -> None:
    """Raises ValueError unless all arrays are of as many samples and classes."""
    num_samples, num_classes = len(record.ids), len(record.class_names)
    num_runs = len(record.early_logits)
    for name, shape in (
        ("correct", (len(record.correct), num_samples)),
        ("logits", (num_samples, num_classes)),
        ("early_logits", (num_runs, num_samples, num_classes)),
        ("early_squared_norms", (num_runs, num_samples)),
        ("labels", (num_samples,)),
    ):
        found = getattr(record, name).shape
        if found != shape:
            raise checks.InputError(f"{path}: {name} is {found}, expected {shape}.")


def read_record(folder: Path, ids: np.ndarray) -> TrainingRecord:
    """Reads the finished record in a folder.

    Raises:
      ValueError: there is none, or it is of other samples than these.
    """
    record = _read(folder / RECORD)
    if record is None:
        raise checks.InputError(f"{folder / RECORD}: not there; record a training first.")
    if not np.array_equal(record.ids, ids):
        raise checks.InputError(f"{folder / RECORD}: is of other samples than the scores.")
    return record
