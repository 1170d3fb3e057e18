"""Fine-tuning of images: batches, steps, tests, and what runs of a sweep share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from dlc_jax import expect
from dlc_jax.distributed import Run, fetch, from_rows_here, one_device, rows_here
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess.images import Images, check_dataset
from dlc_jax.probes.kernel import features_of_batch
from dlc_jax.selection import kept_positions
from dlc_jax.training import loop
from dlc_jax.training.images.data import RunData, TestSet, class_ids_by_name
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.images.step import (
    Network,
    TrainState,
    initial_head,
    outputs_of_batch,
    over_batches,
    predicted_classes,
    train_step,
)
from dlc_jax.training.optimiser import Sgd, learning_rates
from dlc_jax.types import Conventions, Dataset, RunResult, Selection, overridden
from dlc_jax.workspace import Workspace, artefacts


class Finetuner:
    """Trains on subsets of one data set; runs share programs, decoded images and the test set.

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
        self.mesh = run.mesh or one_device()
        self._encoder = encoder.for_mode(conventions.mode)
        images = dataclasses.replace(images, transform=self._encoder.transform)
        self._encoder.check_image_size(images.side)
        if settings.linear_probe and (encoder.drop_path or encoder.dropout):
            raise expect.InputError(
                f"finetune.linear_probe: trains the head alone, and encoder.drop_path "
                f"{encoder.drop_path} and encoder.dropout {encoder.dropout} would do nothing; "
                "expected 0."
            )
        self._images, self._dataset = images, images.dataset
        self._settings, self._conventions, self.shows_bars = settings, conventions, run.progress
        self.num_epochs, self.batch_size = settings.epochs, settings.batch_size
        self.keeps_weights = settings.keep_weights
        self._sgd = Sgd.of(settings)
        whole = Network.of(self._encoder, settings.dtype)
        self._network = Network() if settings.linear_probe else whole
        self._encode = (whole.forward, self._encoder.params)  # for `features_of_batch`
        to_features = functools.partial(features_of_batch, *self._encode)
        self.data = RunData(images, settings, to_features, progress=run.progress)
        self._test = None if test is None else self.data.test_set(test)

    kind = "fine-tuning"
    files: tuple[str, ...] = (loop.METRICS, loop.PER_CLASS)
    checkpoint_steps = 0
    remedy = (
        "try a smaller finetune.learning_rate, such as a tenth of it, or, if that is bfloat16, "
        "finetune.dtype float32"
    )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that its runs have in common."""
        encoder = self._encoder
        rates = {"drop_path": encoder.drop_path, "dropout": encoder.dropout}
        return artefacts.key_of(
            "fine-tuning",
            {
                **{name: rate for name, rate in rates.items() if rate},
                "settings": self._settings.decisive,
                **self.made_of,
                "head": self._encoder.head,
                "statistics": sorted(self._encoder.statistics),
                "test": None if self._test is None else self._test.dataset.fingerprint,
            },
        )

    @property
    def made_of(self) -> dict[str, Any]:
        """Data, encoder and how images are seen."""
        return self._images.made_of(self._encoder.fingerprint, self._conventions.mode)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the test set."""
        if self._test is None:
            return []
        found = [f"test set {self._test.dataset.name}"]
        tested = {*class_ids_by_name(self._test.dataset, self._dataset).tolist()}
        untested = [n for j, n in enumerate(self._dataset.class_names) if j not in tested]
        if untested:
            found.append(f"note: no test image of {expect.listed(untested)}")
        if self._test.skipped:
            found.append(f"unreadable test samples left out: {len(self._test.skipped)}")
        return found

    def positions(self, kept: Selection) -> Int64[np.ndarray, " k"]:
        """Returns where the kept samples are in the data set; ValueError if not all are there."""
        return kept_positions(self._dataset, kept)

    @staticmethod
    def said(result: RunResult) -> str:
        """Returns the line to print at the end of a run."""
        absent = result.absent_classes
        lacking = f", no sample of {expect.listed(absent)}" if absent else ""
        tested = f"test accuracy {result.test_accuracy:.2f} %, {result.num_kept} samples"
        return f"{tested}, {result.seconds:.1f} s{lacking}"

    def write(self, folder: Path, result: RunResult) -> dict[str, Any]:
        """Writes metrics and accuracies of a finished run; returns a summary of its result."""
        loop.write_metrics(folder, result.history)
        num_test = None if self._test is None else self._count(self._test.labels)
        loop.write_per_class(folder, result, self._dataset.class_names, num_test)
        if self._test is not None and result.predictions is not None:
            loop.write_predictions(folder, result.predictions, self._test.labels)
        names = ("num_kept", "test_accuracy", "absent_classes", "skipped_test", "seconds")
        return {name: getattr(result, name) for name in names}

    @staticmethod
    def complete(workspace: Workspace) -> None:
        """Nothing is left to do for a finished run."""

    def start(self, positions: Int64[np.ndarray, " k"], seed: int) -> TrainState:
        """Returns encoder and new head; ValueError where batch norm cannot train on so many."""
        self._check_last_batch(len(positions))
        encoder, side = self._encoder, self._images.side
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
        num_features = features_of_batch.eval_shape(*self._encode, images).shape[1]
        head = initial_head(num_features, self._dataset.num_classes, encoder.head, seed)

        def seeded(leaf: Any) -> Any:
            """Makes streams that a module brings along, as for dropout, those of the run."""
            is_stream = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.fold_in(leaf, seed) if is_stream else leaf

        if self._settings.linear_probe:
            return TrainState.start({}, frozenset(), head, self._sgd)
        params = encoder.with_random_key(jax.tree.map(seeded, encoder.params), seed)
        return TrainState.start(params, encoder.statistics, head, self._sgd)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Returns the steps that an epoch takes; the last batch may be short."""
        return -(-num_samples // self.batch_size)

    def rates(self, steps_per_epoch: int) -> list[float]:
        """Returns the learning rate of every step, the same within an epoch."""
        of_epochs = learning_rates(self._settings, self._conventions)
        return [rate for rate in of_epochs for _ in range(steps_per_epoch)]

    def batches(
        self, positions: Int64[np.ndarray, " k"], seed: int, epoch: int, first: int
    ) -> Iterator[tuple[list[jax.Array], int]]:
        """Yields batches on the devices, of which each process makes its rows, and their sizes."""
        num_rows = -(-self.batch_size // self.mesh.size) * self.mesh.size
        rows = rows_here(self.mesh, num_rows)
        made = self.data.batches(positions, seed, epoch, first, rows)
        for number, batch in enumerate(made, start=first):
            num_left = len(positions) - number * self.batch_size
            on_devices = [from_rows_here(self.mesh, part, num_rows) for part in batch]
            yield on_devices, min(self.batch_size, num_left)

    def step(
        self, state: TrainState, batch: tuple[list[jax.Array], int], rate: float
    ) -> tuple[TrainState, Callable[[], loop.EpochSums]]:
        """Takes a step of SGD."""
        arrays, num_real = batch
        state, metrics = train_step(self._network, self._sgd, state, *arrays, jnp.float32(rate))

        def sums() -> loop.EpochSums:
            """Returns loss, in nats, and whether each sample was right in training mode: 0 or 1."""
            right = fetch(metrics.correct)[:num_real]
            correct = "".join("1" if one else "0" for one in right)
            return {"loss": float(fetch(metrics.loss)) * num_real, "correct": correct}

        return state, sums

    def line(self, progress: loop.Progress, rate: float) -> dict[str, Any]:
        """Returns the metrics of an epoch; ValueError if its last step left NaN or infinity."""
        epoch, sums = len(progress.history) + 1, progress.sums
        if not fetch(_all_finite(progress.state.trained)):
            raise loop.not_finite("weights that are", epoch * progress.num_steps, rate, self.remedy)
        num_samples = len(sums["correct"])
        line = {
            "epoch": epoch,
            "learning_rate": rate,
            "train_loss": sums["loss"] / num_samples,
            "train_accuracy": 100 * sums["correct"].count("1") / num_samples,
            "images_per_s": round(num_samples / sums["elapsed_s"], 1),
            "elapsed_s": round(progress.elapsed_s, 3),
        }
        every = self._settings.test_every
        is_last = epoch == self.num_epochs  # `result` tests then
        if self._test is not None and every and epoch % every == 0 and not is_last:
            _, line["test_accuracy"] = self._tested(self._test, progress.state)
        return line

    def outputs(
        self, state: TrainState, positions: Int64[np.ndarray, " k"]
    ) -> list[Float32[np.ndarray, "k ..."]]:
        """Returns logits [k, c] of training samples and squared norms [k] of the head's input.

        In evaluation mode, on evaluation crops; training does not notice.
        """
        batches = self.data.evaluation_inputs(positions)
        return over_batches(outputs_of_batch, self._network, state, batches, self.batch_size)

    def result(self, progress: loop.Progress, positions: Int64[np.ndarray, " k"]) -> RunResult:
        """Returns weights and history, and tests."""
        predictions, accuracy, per_class = None, None, None
        history = progress.history or [{"epoch": 0}]
        if self._test is not None:
            predictions, accuracy = self._tested(self._test, progress.state)
            labels = self._test.labels
            with np.errstate(invalid="ignore"):  # 0 / 0 for a class without test samples is NaN
                per_class = 100 * self._count(labels[predictions == labels]) / self._count(labels)
            history = [*history[:-1], {**history[-1], "test_accuracy": accuracy}]
        absent = np.flatnonzero(self._count(self._dataset.labels[positions]) == 0)
        weights = progress.state.weights()
        if self._settings.linear_probe:
            weights["encoder"] = self._encoder.params
        return RunResult(
            test_accuracy=accuracy,
            per_class_accuracy=per_class,
            predictions=predictions,
            num_kept=len(positions),
            absent_classes=tuple(self._dataset.class_names[label] for label in absent),
            history=history,
            weights=weights,
            skipped_test={} if self._test is None else self._test.skipped,
            seconds=progress.elapsed_s,
        )

    def _count(self, labels: Integer[np.ndarray, " k"]) -> Int64[np.ndarray, " c"]:
        return np.bincount(labels, minlength=self._dataset.num_classes)

    def _tested(self, test: TestSet, state: TrainState) -> tuple[Int32[np.ndarray, " n"], float]:
        """Returns the class of highest logit of every test sample, and the accuracy in percent."""
        size = self.batch_size
        batches = (test.inputs[i : i + size] for i in range(0, len(test.inputs), size))
        (found,) = over_batches(predicted_classes, self._network, state, batches, size)
        predictions = found.astype(np.int32)
        return predictions, 100 * int((predictions == test.labels).sum()) / len(predictions)

    def _check_last_batch(self, num_kept: int) -> None:
        """Batch norm of a single value is no statistic; torch refuses it as well."""
        encoder, size = self._encoder, self.batch_size
        if (num_kept % size != 1 and size != 1) or self._network.apply_training is None:
            return
        side = self._images.side
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        shape = jax.eval_shape(encoder.apply, encoder.params, images).shape
        if encoder.statistics and self.num_epochs and shape[1:3] == (1, 1):
            raise expect.SharedError(
                f"finetune.batch_size: {size} leaves a last batch of one of {num_kept} samples, "
                f"and at {side} px the last map is 1 x 1, so that batch norm would see "
                "a single value; expected another batch size, or a larger image size."
            )


@jax.jit
def _all_finite(tree: Any) -> Bool[jax.Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


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
      image_size: Side of the images in pixels; None: that of `images`, of a data set that of
        the encoder's `transform`.
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
    expect.is_a(FinetuneConfig, settings=settings)
    expect.is_a(Run, run=run)
    settings = overridden(
        settings, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate
    )
    run = overridden(run, folder=folder)
    positions = kept_positions(images.dataset, kept)
    if seed is None:
        seed = kept.seed if isinstance(kept, Selection) else 0
    finetuner = Finetuner(encoder, images, test, settings, Conventions.of(mode), run)
    if run.path is None:
        return loop.train(finetuner, positions, seed)
    workspace = Workspace(run.path)
    step = loop.RunStep(finetuner, positions, seed, run.path, settings=dataclasses.asdict(settings))
    with workspace.held("folder"):
        return workspace.make(step)
