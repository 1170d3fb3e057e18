"""LoRA fine-tuning: batches, steps, the adapter at the end, and what runs of a sweep share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from dlc_jax import distributed, expect
from dlc_jax.distributed import Run, Team
from dlc_jax.encoders.adapter_dropout import StepId
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.exports import peft
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.probes.text import response_losses
from dlc_jax.selection import kept_rows
from dlc_jax.training import loop
from dlc_jax.training.lora.settings import LoraConfig, learning_rates
from dlc_jax.training.lora.step import (
    LoraState,
    Optimiser,
    Sums,
    add_rows,
    initial_adapter,
    rows_of_step,
    take_step,
)
from dlc_jax.training.optimiser import epoch_order
from dlc_jax.types import Selection, by_path, overridden
from dlc_jax.workspace import Workspace, Written, artefacts, records

MERGED = "merged"  # folder beside the adapter's


@dataclasses.dataclass(frozen=True, eq=False)
class LoraResult:
    """What a run ended with.

    Attributes:
      model: The given model with the adapter.
      num_kept: Training samples.
      test_loss: Mean over all response tokens of the test set, in nats; None without one.
      history: One dictionary per epoch: epoch, step, learning_rate (of its last step), train_loss
        (nats per token that counts), tokens_per_s (of responses and prompts; compilation counts),
        elapsed_s.
      seconds: Time of all steps, those of interrupted runs too.
    """

    model: LanguageModel = dataclasses.field(repr=False)
    num_kept: int
    test_loss: float | None
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    seconds: float


class StepSamples(NamedTuple):
    """Positions of the samples of a step, and which step it is."""

    positions: Int64[np.ndarray, " b"]
    step: StepId


class LoraTuner:
    """Trains on subsets of one data set; runs share programs, weights and the test set.

    Args:
      model, data, test, progress: See `finetune_lora`.
      settings: How to train.
      max_length: Longest row in tokens; None: the model's limit.
      tokens_per_batch: Rows times padded length of a program call that tests.
    Raises:
      ValueError: see `finetune_lora`.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: Tokenised,
        settings: LoraConfig,
        *,
        test: Tokenised | None = None,
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        progress: bool = False,
    ):
        settings.check()
        model.check_has_no_adapter()
        self._model, self._data, self._test, self._settings = model, data, test, settings
        self._max_length = max_length or model.config.max_length
        self._tokens_per_batch, self.shows_bars = tokens_per_batch, progress
        self.num_epochs = settings.epochs
        self.checkpoint_steps = settings.checkpoint_steps
        self.keeps_weights = settings.keep_weights
        for name, some in (("data", data), ("test", test)):
            if some is not None:
                longest, tokens = max(some.named, key=lambda row: len(row[1]))
                if len(tokens) > self._max_length:
                    raise expect.InputError(
                        f"{name}: {longest} has {len(tokens)} tokens, expected at most "
                        f"{self._max_length}; tokenise with max_length={self._max_length}."
                    )
                model.check_tokens((f"{name}: {row}", ids) for row, ids in some.named)
        self._architecture = model.architecture.for_training(
            settings.adapter, settings.rematerialise
        )
        self._optimiser = Optimiser.of(settings)
        self.mesh = mesh = distributed.mesh_of(model.params)  # None: on the default device
        if settings.merge and mesh is not None and Team.of(mesh).mesh.is_multi_process:
            raise expect.InputError(
                "lora.merge: True, but no process has all weights; expected mesh.fsdp to divide "
                "the number of devices of a process, or write_merged later, on one machine."
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that its runs have in common."""
        return artefacts.key_of(
            "adapter",
            {
                "settings": self._settings.decisive,
                "model": self._model.fingerprint,
                "data": self._data.fingerprint,
                "test": None if self._test is None else self._test.fingerprint,
            },
        )

    kind = "adapter"
    files: tuple[str, ...] = (
        loop.METRICS,
        f"{loop.ADAPTER}/{peft.ADAPTER_WEIGHTS}",
        f"{loop.ADAPTER}/{peft.ADAPTER_CONFIG}",
    )
    remedy = "try a smaller lora.learning_rate, such as a tenth of it"

    @property
    def notes(self) -> list[str]:
        """What the user should know before the first run."""
        found = [] if self._test is None else [f"test set of {len(self._test)} instructions"]
        for name, data in (("training", self._data), ("test", self._test)):
            if data is not None and (num := int(data.truncated.sum())):
                found.append(f"note: {num} of {len(data)} {name} samples are cut off")
        return found

    def positions(
        self, kept: Selection | np.ndarray | Sequence[int] | None
    ) -> Int64[np.ndarray, " k"]:
        """Returns where kept samples are; ValueError if not all are there, or no step is left."""
        found = kept_rows("instructions", self._data.ids, kept)
        self.steps_per_epoch(len(found))
        return found

    def steps_per_epoch(self, num_samples: int) -> int:
        """Returns the steps that an epoch takes."""
        return self._settings.steps_per_epoch(num_samples)

    @staticmethod
    def said(result: LoraResult) -> str:
        """Returns the line to print at the end of a run."""
        loss = "" if result.test_loss is None else f"test loss {result.test_loss:.4f}, "
        return f"{loss}{result.num_kept} samples, {result.seconds:.1f} s"

    def complete(self, workspace: Workspace) -> None:
        """Writes the merged model of a finished run, where it is asked for."""
        if self._settings.merge:
            workspace.ensure(MergedStep(self._model, workspace.root))

    def write(self, folder: Path, result: LoraResult) -> dict[str, Any]:
        """Writes adapter and metrics of a finished run; returns a summary of its result."""
        peft.write_adapter(result.model, folder / loop.ADAPTER)
        loop.write_metrics(folder, result.history)
        return {name: getattr(result, name) for name in ("num_kept", "test_loss", "seconds")}

    def read(self, folder: Path) -> LoraResult:
        """Returns the result of a finished run."""
        record = records.read(folder, records.RUN)
        assert record is not None  # it is finished
        model = peft.load_adapter(self._model, folder / loop.ADAPTER)
        return LoraResult(model, history=loop.read_metrics(folder), **record.facts[records.RESULT])

    def start(self, positions: Int64[np.ndarray, " k"], seed: int) -> LoraState:
        """Returns the state before the first step, of an adapter that changes nothing yet."""
        adapter = jax.tree.map(jnp.asarray, initial_adapter(self._architecture, seed))
        return LoraState(adapter, self._optimiser.at(0.0).init(adapter))

    def rates(self, steps_per_epoch: int) -> list[float]:
        """Returns the learning rate of every step."""
        num_steps, settings = steps_per_epoch * self.num_epochs, self._settings
        return learning_rates(num_steps, settings.learning_rate, settings.warmup_steps)

    def batches(
        self, positions: Int64[np.ndarray, " k"], seed: int, epoch: int, first: int
    ) -> Iterator[StepSamples]:
        """Yields the samples of every step."""
        order, size = epoch_order(positions, seed, epoch), self._settings.batch_size
        for number in range(first, self.steps_per_epoch(len(order))):
            some = order[number * size : (number + 1) * size]
            yield StepSamples(some, StepId(seed, epoch, number))

    def step(
        self, state: LoraState, batch: StepSamples, rate: float
    ) -> tuple[LoraState, Callable[[], loop.EpochSums]]:
        """Adds up the gradients of some rows after others, and takes a step of the optimiser."""
        params, data, settings = self._model.params, self._data, self._settings
        sums = distributed.on_every_device(params, Sums.zero(state.adapter))
        num_tokens, num_rows = 0, distributed.whole_rows(params, settings.rows_at_once)
        rows_of = functools.partial(
            rows_of_step,
            packing=settings.packing,
            loss_on=settings.loss_on,
            drawing=batch.step if settings.dropout else None,
        )
        for rows in rows_of(data, batch.positions, num_rows, self._max_length):
            num_tokens += int(rows.counts.sum())
            placed = distributed.over_devices(params, rows)
            sums = add_rows(self._architecture, params, state.adapter, placed, sums)
        state = take_step(
            self._optimiser, state, sums.gradients, jnp.float32(num_tokens), jnp.float32(rate)
        )
        loss, num_read = sums.loss, sum(len(data.tokens[i]) for i in batch.positions)
        known = {"num_tokens": num_tokens, "num_read": num_read}
        return state, lambda: {"loss": float(distributed.fetch(loss)), **known}

    def line(self, progress: loop.Progress, rate: float) -> dict[str, Any]:
        """Returns the metrics of an epoch."""
        epoch, sums = len(progress.history) + 1, progress.sums
        return {
            "epoch": epoch,
            "step": epoch * progress.num_steps,
            "learning_rate": rate,
            "train_loss": sums["loss"] / sums["num_tokens"],
            "tokens_per_s": round(sums["num_read"] / sums["elapsed_s"], 1),
            "elapsed_s": round(progress.elapsed_s, 3),
        }

    def result(self, progress: loop.Progress, positions: Int64[np.ndarray, " k"]) -> LoraResult:
        """Returns model and history, and tests; ValueError if the adapter is not finite."""
        model = self._model.with_adapter(self._settings.adapter, progress.state.adapter)
        for path, leaf in by_path(progress.state.adapter).items():  # no later loss would show it
            if not np.isfinite(distributed.fetch(leaf)).all():
                raise expect.SharedError(
                    f"fine-tuning gave an adapter with NaN or infinite values ({path}) at its last "
                    f"step; {self.remedy}."
                )
        test_loss, test = None, self._test
        if test is not None:
            losses = response_losses(model, test, tokens_per_batch=self._tokens_per_batch)
            test_loss = float(np.average(losses.astype(np.float64), weights=test.num_response))
        return LoraResult(model, len(positions), test_loss, progress.history, progress.elapsed_s)


@dataclasses.dataclass(frozen=True, eq=False)
class MergedStep:
    """The model with the adapter of a run added, in `merged/` beside it."""

    model: LanguageModel
    root: Path  # folder of the run

    name = "adapter/merged"
    kind = "adapter"
    stage = "finetune"
    settings: ClassVar[Mapping[str, Any]] = {}
    obsolete = ()
    files = (f"{MERGED}/config.json",)

    @property
    def key(self) -> dict[str, Any]:
        run = records.read(self.root, records.RUN)
        assert run is not None  # it is finished
        adapter = {name: sha for name, sha in run.outputs.items() if name.startswith(loop.ADAPTER)}
        return {"model": self.model.fingerprint, "adapter": adapter}

    def compute(self, scratch: Path) -> LanguageModel:
        return peft.load_adapter(self.model, self.root / loop.ADAPTER)

    def write(self, root: Path, model: LanguageModel) -> Written:
        peft.write_merged(model, root / MERGED)
        return Written(f"{MERGED}/{name}" for name in artefacts.names_below(root / MERGED))


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

    The loss of a step is the mean over all response tokens of its samples, or over their whole text
    with `loss_on`. Adapter, gradients and optimiser are float32, whatever the model is in. The same
    seed gives the same adapter.

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
    expect.is_a(LoraConfig, settings=settings)
    expect.is_a(Run, run=run)
    if run.mesh is not None and run.mesh.size > 1 and run.mesh != distributed.mesh_of(model.params):
        raise expect.InputError(
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
        return loop.train(tuner, positions, seed)
    workspace = Workspace(run.path)
    step = loop.RunStep(tuner, positions, seed, run.path, settings=dataclasses.asdict(settings))
    with workspace.held("folder"):
        workspace.ensure(step)
        tuner.complete(workspace)
    return tuner.read(run.path)
