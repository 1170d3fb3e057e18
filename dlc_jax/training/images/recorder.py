"""Fine-tuning on a whole data set, watched: what the training-based scores are made of."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from dlc_jax import checks
from dlc_jax.distributed import Run, one_device, processes
from dlc_jax.distributed.processes import told_by_first
from dlc_jax.encoders import Encoder
from dlc_jax.files import array_files
from dlc_jax.files.array_files import Expected
from dlc_jax.files.json_files import NAME, parse_json
from dlc_jax.preprocess import Images
from dlc_jax.training.folder import SEEN, RunFolder
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
from dlc_jax.training.images.step import TrainState
from dlc_jax.types import Conventions, TrainingRecord
from dlc_jax.workspace import artefacts

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
        self._folder, self._mesh = run.path, run.mesh or one_device()
        self.early_epoch = max(1, round(record.early_fraction * settings.epochs))
        num_runs = record.num_runs or conventions.num_runs
        checks.seed(seed)
        checks.seed(seed + num_runs - 1, "seed of the last run")
        self.seeds = range(int(seed), int(seed) + num_runs)

    @functools.cached_property
    def inputs(self) -> str:
        """SHA-256 over all that decides the record."""
        shared = self._finetuner.fingerprint
        return artefacts.json_hash(
            {
                "shared": shared,
                "seeds": [self.seeds.start, self.seeds.stop],
                "early_epoch": self.early_epoch,
            }
        )

    @property
    def num_epochs(self) -> int:
        """Of the first run."""
        return int(self._settings.epochs)

    def run(self) -> TrainingRecord | None:
        """Trains and records, or resumes a stopped call in the folder.

        Returns:
          The record; None in processes that help the first one with it.
        """
        folder = self._folder
        if folder is None:
            return self._record(None)
        if self._helps:
            if not told_by_first(lambda: False):
                self._runs(None)
            return None
        with artefacts.locked(folder):
            artefacts.clear_leftovers(folder)
            # the inputs of the first run do not contain the other settings of the record
            run = RunFolder(folder, (RECORD,))
            record = self._finished(run)
            if record is None:
                run.claim(self.inputs, {})
            if self._mesh.is_multi_process:
                is_there = record is not None
                told_by_first(lambda: is_there)
            if record is None:
                record = self._record(folder)
                _write(folder / RECORD, record)
                summary = {"num_kept": len(record.ids), "seconds": record.seconds}
                run.conclude(summary, keep_weights=True)
            for seed in self.seeds:  # also if killed after the record was written
                RunFolder(_run_path(folder, seed)).drop_weights()
                artefacts.remove(_run_path(folder, seed) / SEEN)
        return record

    def _finished(self, run: RunFolder) -> TrainingRecord | None:
        """Returns the record if it is there; raises ValueError unless it is as it was written."""
        path, facts = run.path / RECORD, run.facts()
        if facts.get("inputs") != self.inputs or "result" not in facts or not path.exists():
            return None
        if damage := run.damage():
            raise checks.InputError(
                f"{path}: not a training record: {damage}. Delete it to record again."
            )
        return _read(path)

    @property
    def _helps(self) -> bool:
        """Whether this process trains with another, which keeps the record."""
        return self._mesh.is_multi_process and not processes.is_first()

    def _record(self, folder: Path | None) -> TrainingRecord:
        positions, skipped, runs, seconds = self._runs(folder)
        epochs = range(1, self._settings.epochs + 1)
        early = f"epoch_{self.early_epoch}"
        return TrainingRecord(
            correct=np.stack([runs[0].get(f"correct_{epoch}") for epoch in epochs]),
            logits=runs[0].get(f"epoch_{self._settings.epochs}_logits"),
            early_logits=np.stack([seen.get(f"{early}_logits") for seen in runs]),
            early_squared_norms=np.stack([seen.get(f"{early}_squared_norms") for seen in runs]),
            early_epoch=self.early_epoch,
            batch_size=int(self._settings.batch_size),
            labels=self._dataset.labels[positions],
            ids=self._dataset.ids[positions],
            class_names=self._dataset.class_names,
            seconds=seconds,
            num_epochs=int(self._settings.epochs) + (len(runs) - 1) * self.early_epoch,
            skipped=skipped,
        )

    def _runs(
        self, folder: Path | None
    ) -> tuple[Int64[np.ndarray, " n"], dict[str, str], list[_Seen], float]:
        """Returns the positions, samples that are left out, what each run showed, and seconds."""
        start = time.perf_counter()
        positions = np.arange(len(self._dataset))
        skipped: dict[str, str] = {}
        if self._images.on_corrupt == "skip":
            positions, skipped = self._finetuner.readable()
        seconds = time.perf_counter() - start
        runs = []
        for seed in self.seeds:
            path = None if folder is None else _run_path(folder, seed)
            seen = _Seen({}, None if path is None else path / SEEN)
            last = self._settings.epochs if seed == self.seeds.start else self.early_epoch
            watch = _Watch(self._finetuner, positions, (self.early_epoch, last), seen)
            result = self._finetuner.run(
                positions,
                seed,
                None if path is None else RunFolder(path),
                observer=watch,
                stop_after=last,
            )
            seconds += result.seconds
            runs.append(seen)
        return positions, skipped, runs, seconds


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


class _Watch(NamedTuple):
    """Sees to it that what a run shows is kept before its checkpoint counts."""

    finetuner: Finetuner
    positions: Int64[np.ndarray, " n"]
    epochs: tuple[int, ...]  # after which to look at logits
    seen: _Seen

    def __call__(self, epoch: int, state: TrainState, correct: Bool[np.ndarray, " n"]) -> None:
        self.seen.put(f"correct_{epoch}", correct)
        if epoch in self.epochs:
            logits, squared_norms = self.finetuner.outputs(state, self.positions)
            self.seen.put(f"epoch_{epoch}_logits", logits)
            self.seen.put(f"epoch_{epoch}_squared_norms", squared_norms)


def _run_path(folder: Path, seed: int) -> Path:
    return folder / f"seed_{seed}"


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
