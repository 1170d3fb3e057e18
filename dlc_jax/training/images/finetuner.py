"""The loop of fine-tuning: epochs over a kept set, tests, and what runs of a sweep share."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.distributed import (
    Run,
    from_first,
    from_rows_here,
    hides_bar,
    one_device,
    rows_here,
    stopping,
)
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess import Images
from dlc_jax.probes.kernel import features_of_batch
from dlc_jax.selection import kept_positions
from dlc_jax.training.folder import (
    METRICS,
    PER_CLASS,
    STOPPED,
    RunFolder,
    write_metrics,
    write_per_class,
)
from dlc_jax.training.images import evaluation
from dlc_jax.training.images.batches import training_batches
from dlc_jax.training.images.data import RunData, class_ids_by_name
from dlc_jax.training.images.metrics import EpochMetrics
from dlc_jax.training.images.progress import Observer, Open, Progress, observed
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step
from dlc_jax.training.optimiser import learning_rates
from dlc_jax.training.order import epoch_order
from dlc_jax.types import Conventions, Dataset, RunResult, Selection
from dlc_jax.workspace import Workspace, artefacts
from dlc_jax.workspace.checkpoints import Checkpoints
from dlc_jax.workspace.keys import key_of


class _Left(Exception):
    """An epoch was left before its end."""

    def __init__(self, progress: Progress):
        super().__init__("stopped")
        self.progress = progress


class Finetuner:
    """Runs on subsets of one data set that share programs, decoded images and the test set.

    Args: see `finetune`. Each run has a folder of its own, and that of `run` is not used.
    Raises:
      ValueError: see `finetune`.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: Images,
        test: Dataset | None,
        settings: FinetuneConfig,
        conventions: Conventions,
        run: Run = Run(),
    ):
        settings.check()
        self._mesh = run.mesh or one_device()
        self._encoder = encoder.for_mode(conventions.mode)
        self._encoder.check_image_size(images.size)
        self._images, self._dataset, self._test = images, images.dataset, test
        self._settings, self._mode, self._progress = settings, conventions.mode, run.progress
        self._rates = learning_rates(
            settings.epochs,
            settings.learning_rate,
            settings.milestones,
            floors_milestones=conventions.floors_milestones,
        )
        self._sgd = Sgd.of(settings)
        whole = Network.of(self._encoder, settings.dtype)
        assert whole.forward is not None
        self._forward = whole.forward
        self._network = Network.linear_probe() if settings.linear_probe else whole
        self._data = RunData(
            images,
            settings=settings,
            to_features=functools.partial(features_of_batch, whole.forward, self._encoder.params),
            progress=run.progress,
        )
        self._test_set = None if test is None else self._data.test_set(test)

    kind = "fine-tuning"
    files = (METRICS, PER_CLASS)

    @property
    def skipped_test(self) -> dict[str, str]:
        """Test samples left out as unreadable, id: why."""
        return self._test_set.skipped if self._test_set is not None else {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that its runs have in common."""
        return key_of(
            "fine-tuning",
            {
                "settings": self._settings.decisive,
                **self.made_of,
                "head": self._encoder.head,
                "statistics": sorted(self._encoder.statistics),
                "test": self._test.fingerprint if self._test is not None else None,
            },
        )

    @property
    def made_of(self) -> dict[str, Any]:
        """Data, encoder and how images are seen."""
        return self._images.made_of(self._encoder.fingerprint, self._mode)

    @property
    def keeps_weights(self) -> bool:
        """Whether the last checkpoint of a finished run is kept."""
        return self._settings.keep_weights

    @property
    def notes(self) -> list[str]:
        """What the user should know of the test set."""
        if self._test is None:
            return []
        found = [f"test set {self._test.name}"]
        tested = {*class_ids_by_name(self._test, self._dataset).tolist()}
        untested = [n for j, n in enumerate(self._dataset.class_names) if j not in tested]
        if untested:
            found.append(f"note: no test image of {checks.listed(untested)}")
        if self.skipped_test:
            found.append(f"unreadable test samples left out: {len(self.skipped_test)}")
        return found

    def positions(self, kept: Selection) -> Int64[np.ndarray, " k"]:
        """Returns where the kept samples are in the data set; ValueError if not all are there."""
        return kept_positions(self._dataset, kept)

    @staticmethod
    def said(result: RunResult) -> str:
        """Returns the line to print at the end of a run."""
        absent = result.absent_classes
        return (
            f"test accuracy {result.test_accuracy:.2f} %, {result.num_kept} samples, "
            f"{result.seconds:.1f} s"
            + (f", no sample of {checks.listed(absent)}" if absent else "")
        )

    def run(
        self,
        positions: Int64[np.ndarray, " k"],
        seed: int,
        folder: RunFolder | None = None,
        *,
        observer: Observer | None = None,
        stop_after: int | None = None,
    ) -> RunResult:
        """Trains on these positions, or resumes a stopped run in `folder`.

        Args:
          positions: Ascending, in the data set.
          seed: Seed of head, data order and augmentation.
          folder: Where the run keeps its state; None: nowhere.
          observer: Sees every epoch; its time counts as the epoch's.
          stop_after: Epochs to end after, on the schedule of all; None: all.

        On a mesh of several processes all of them call this, and the first alone gives a folder.
        """
        checks.seed(seed)
        self._check_last_batch(len(positions))
        with contextlib.ExitStack() as stack:
            checkpoints = None
            if folder is not None:
                checkpoints = stack.enter_context(folder.checkpoints())
            # what is kept nowhere need not be brought to an end
            if folder is not None or self._mesh.is_multi_process:
                stack.enter_context(stopping.at_steps())
            progress = self._start(seed, folder, checkpoints)
            last = self._settings.epochs if stop_after is None else stop_after
            for epoch in range(len(progress.history) + 1, last + 1):
                try:
                    progress = self._epoch(progress, positions, seed, epoch)
                except _Left as left:
                    self._leave(left.progress, folder)
                if observer is not None:
                    progress = observed(progress, observer)
                if folder is not None and checkpoints is not None:
                    checkpoints.save(epoch, progress.state, progress.told)
                    folder.write_metrics(progress.history)
            if checkpoints is not None:
                checkpoints.wait()
            return self._result(progress, positions)

    def write(self, folder: Path, result: RunResult) -> dict[str, Any]:
        """Writes metrics and accuracies of a finished run; returns a summary of its result."""
        write_metrics(folder, result.history)
        num_test = None if self._test_set is None else self._count(self._test_set.labels)
        write_per_class(folder, result, self._dataset.class_names, num_test)
        return {
            "num_kept": result.num_kept,
            "test_accuracy": result.test_accuracy,
            "absent_classes": result.absent_classes,
            "skipped_test": result.skipped_test,
            "seconds": result.seconds,
        }

    @staticmethod
    def complete(workspace: Workspace) -> None:
        """Nothing is left to do for a finished run."""

    def _start(
        self, seed: int, folder: RunFolder | None, checkpoints: Checkpoints | None
    ) -> Progress:
        """Returns where a run begins, in all processes: new, or where the first one left it."""
        new = progress = Progress(self._first_state(seed), [])
        if checkpoints is not None and (saved := checkpoints.restore(new.state)) is not None:
            progress = Progress.of(*saved)
        if folder is not None and folder.stopped.is_dir():
            with folder.checkpoints(STOPPED) as stopped:
                saved = stopped.restore(new.state)
            if saved is not None and len(Progress.of(*saved).history) >= len(progress.history):
                progress = Progress.of(*saved)
        return Progress.of(*from_first(self._mesh, progress.state, progress.told))

    def _num_steps(self, positions: Int64[np.ndarray, " k"]) -> int:
        """Returns how many an epoch has."""
        return -(-len(positions) // self._settings.batch_size)

    def _epoch(
        self,
        progress: Progress,
        positions: Int64[np.ndarray, " k"],
        seed: int,
        epoch: int,
    ) -> Progress:
        start = time.perf_counter()
        num_steps = self._num_steps(positions)
        before = progress.open or Open(0, 0.0, "", 0.0)
        totals = EpochMetrics(
            self._rates[epoch - 1],
            (epoch - 1) * num_steps + before.num_steps,
            before.loss,
            [before.correct_array],
        )
        state = progress.state
        rate = jnp.float32(totals.learning_rate)
        batches = self._batches(positions, seed, epoch, before.num_steps)
        bar = tqdm(
            batches,
            f"epoch {epoch}/{self._settings.epochs}",
            num_steps,
            initial=before.num_steps,
            unit="step",
            leave=False,
            disable=hides_bar(self._progress),
        )
        for step, (batch, num_real) in enumerate(bar, start=before.num_steps + 1):
            state, metrics = train_step(self._network, self._sgd, state, *batch, rate)
            totals.add(metrics, num_real)
            if step < num_steps and stopping.is_due():
                seconds = before.elapsed_s + time.perf_counter() - start
                raise _Left(progress._replace(state=state, open=totals.left_at(step, seconds)))
        totals.finish(state)
        correct = np.zeros(len(self._dataset), bool)
        correct[epoch_order(positions, seed, epoch)] = np.concatenate(totals.correct)
        seconds = before.elapsed_s + time.perf_counter() - start
        line = {
            "epoch": epoch,
            "learning_rate": totals.learning_rate,
            "train_loss": totals.loss / len(positions),
            "train_accuracy": 100 * int(correct.sum()) / len(positions),
            "images_per_s": round(len(positions) / seconds, 1),
            "elapsed_s": round(progress.elapsed_s + seconds, 3),
        }
        every = self._settings.test_every
        is_last = epoch == self._settings.epochs  # `_result` tests then
        if self._test_set is not None and every and epoch % every == 0 and not is_last:
            line["test_accuracy"] = self._accuracy(self._predictions(state))
        return Progress(state, [*progress.history, line], correct[positions])

    def _leave(self, left: Progress, folder: RunFolder | None) -> NoReturn:
        """Keeps a run that has to stop within an epoch, and stops."""
        if folder is not None and left.open is not None:
            artefacts.remove(folder.stopped)  # of an earlier stop
            with folder.checkpoints(STOPPED) as stopped:
                stopped.save(left.open.num_steps, left.state, left.told)
        stopping.stop_together()

    def _batches(
        self, positions: Int64[np.ndarray, " k"], seed: int, epoch: int, first: int
    ) -> Iterator[tuple[tuple[jax.Array, ...], int]]:
        """Yields batches on the devices, of which each process makes its rows, and their sizes."""
        batch_size = self._settings.batch_size
        num_rows = -(-batch_size // self._mesh.size) * self._mesh.size
        made = training_batches(
            self._data.training_inputs(positions, seed),
            positions,
            self._dataset.labels,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            num_rows=num_rows,
            rows=rows_here(self._mesh, num_rows),
            first=first,
        )
        for number, batch in enumerate(made, start=first):
            on_devices = [from_rows_here(self._mesh, part, num_rows) for part in batch]
            yield tuple(on_devices), min(batch_size, len(positions) - number * batch_size)

    def readable(self) -> tuple[Int64[np.ndarray, " k"], dict[str, str]]:
        """Returns the positions of samples that can be read, and of others the id: why."""
        return self._data.readable()

    def outputs(
        self, state: TrainState, positions: Int64[np.ndarray, " k"]
    ) -> tuple[Float32[np.ndarray, "k c"], Float32[np.ndarray, " k"]]:
        """Returns logits of training samples and squared norms of the head's input.

        In evaluation mode, on evaluation crops; training does not notice.
        """
        batches = self._data.evaluation_inputs(positions)
        found = evaluation.outputs(self._network, state, batches, self._settings.batch_size)
        if len(found[0]) < len(positions):
            raise checks.InputError(
                f"{self._dataset.name}: {len(positions) - len(found[0])} of {len(positions)} "
                "training samples cannot be read any more."
            )
        return found

    def _result(self, progress: Progress, positions: Int64[np.ndarray, " k"]) -> RunResult:
        predictions, accuracy, per_class = None, None, None
        history = progress.history or [{"epoch": 0}]
        if self._test_set is not None:
            predictions = self._predictions(progress.state)
            accuracy = self._accuracy(predictions)
            labels = self._test_set.labels
            with np.errstate(invalid="ignore"):  # 0 / 0 for a class without test samples is NaN
                per_class = 100 * self._count(labels[predictions == labels]) / self._count(labels)
            history = [*history[:-1], {**history[-1], "test_accuracy": accuracy}]
        absent = np.flatnonzero(self._count(self._dataset.labels[positions]) == 0)
        return RunResult(
            test_accuracy=accuracy,
            per_class_accuracy=per_class,
            predictions=predictions,
            num_kept=len(positions),
            absent_classes=tuple(self._dataset.class_names[label] for label in absent),
            history=history,
            weights=self._weights(progress.state),
            skipped_test=self.skipped_test,
            seconds=progress.elapsed_s,
        )

    def _weights(self, state: TrainState) -> dict[str, Any]:
        weights = state.weights()
        if self._settings.linear_probe:
            weights["encoder"] = self._encoder.params
        return weights

    def _count(self, labels: Integer[np.ndarray, " k"]) -> Int64[np.ndarray, " c"]:
        return np.bincount(labels, minlength=self._dataset.num_classes)

    def _accuracy(self, predictions: Int32[np.ndarray, " n"]) -> float:
        assert self._test_set is not None
        num_right = int((predictions == self._test_set.labels).sum())
        return 100 * num_right / len(predictions)

    def _first_state(self, seed: int) -> TrainState:
        encoder = self._encoder
        head = initial_head(self._num_features, self._dataset.num_classes, encoder.head, seed)
        if self._settings.linear_probe:
            return TrainState.start({}, frozenset(), head, self._sgd)
        params = jax.tree.map(lambda leaf: _seeded(leaf, seed), encoder.params)
        return TrainState.start(params, encoder.statistics, head, self._sgd)

    def _check_last_batch(self, num_kept: int) -> None:
        """Batch norm of a single value is no statistic; torch refuses it as well."""
        encoder, size = self._encoder, self._settings.batch_size
        if (num_kept % size != 1 and size != 1) or self._network.apply_training is None:
            return
        side = self._images.size
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        shape = jax.eval_shape(encoder.apply, encoder.params, images).shape
        if encoder.statistics and self._settings.epochs and shape[1:3] == (1, 1):
            raise checks.SharedError(
                f"finetune.batch_size: {size} leaves a last batch of one of {num_kept} samples, "
                f"and at {side} px the last map is 1 x 1, so that batch norm would see "
                "a single value; expected another batch size, or a larger image size."
            )

    @functools.cached_property
    def _num_features(self) -> int:
        side = self._images.size
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
        return features_of_batch.eval_shape(self._forward, self._encoder.params, images).shape[1]

    def _predictions(self, state: TrainState) -> Int32[np.ndarray, " n"]:
        assert self._test_set is not None
        inputs, size = self._test_set.inputs, self._settings.batch_size
        return evaluation.predictions(self._network, state, inputs, size)


def _seeded(leaf: Any, seed: int) -> Any:
    """Makes random streams that a module brings along, as for dropout, those of the run."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, seed)
    return leaf
