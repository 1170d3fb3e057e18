"""The loop of LoRA fine-tuning: steps over a kept set, checkpoints, and the adapter at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.distributed import (
    Team,
    fetch,
    from_first,
    hides_bar,
    mesh_of,
    on_every_device,
    over_devices,
    stopping,
    whole_rows,
)
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.exports.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapter,
    write_adapter,
    write_merged,
)
from dlc_jax.preprocess.tokens import TOKENS_PER_BATCH, Tokenised
from dlc_jax.probes.responses import response_losses
from dlc_jax.selection.kept import kept_rows
from dlc_jax.training.folder import (
    ADAPTER,
    MERGED,
    METRICS,
    RunFolder,
    read_metrics,
    write_metrics,
)
from dlc_jax.training.lora.batches import rows_of_step
from dlc_jax.training.lora.progress import Plan, Progress, initial_adapter
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Optimiser, Sums, add_rows, take_step
from dlc_jax.types import Selection, by_path
from dlc_jax.workspace import Workspace, Written, artefacts, records
from dlc_jax.workspace.checkpoints import Checkpoints
from dlc_jax.workspace.keys import key_of


@dataclasses.dataclass(frozen=True, eq=False)
class LoraResult:
    """What a run ended with.

    Attributes:
      model: The given model with the adapter.
      num_kept: Training samples.
      test_loss: Mean over all response tokens of the test set, in nats; None without one.
      history: One dictionary per epoch: epoch, step, learning_rate (of its last step), train_loss
        (nats per response token), tokens_per_s (of responses and prompts; compilation counts),
        elapsed_s.
      seconds: Time of all steps, those of interrupted runs too.
    """

    model: LanguageModel = dataclasses.field(repr=False)
    num_kept: int
    test_loss: float | None
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    seconds: float


class LoraTuner:
    """Runs on subsets of one data set that share programs, weights and the test set.

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
        self._tokens_per_batch, self._progress = tokens_per_batch, progress
        for name, some in (("data", data), ("test", test)):
            if some is not None:
                _check_lengths(name, some, self._max_length)
                model.check_tokens((f"{name}: {row}", ids) for row, ids in some.named)
        self._architecture = dataclasses.replace(
            model.architecture.with_adapter(settings.adapter), rematerialise=settings.rematerialise
        )
        self._optimiser = Optimiser.of(settings)
        mesh = self._mesh
        if settings.merge and mesh is not None and Team.of(mesh).mesh.is_multi_process:
            raise checks.InputError(
                "lora.merge: True, but no process has all weights; expected mesh.fsdp to divide "
                "the number of devices of a process, or write_merged later, on one machine."
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that its runs have in common."""
        return key_of(
            "adapter",
            {
                "settings": self._settings.decisive,
                "model": self._model.fingerprint,
                "data": self._data.fingerprint,
                "test": None if self._test is None else self._test.fingerprint,
            },
        )

    kind = "adapter"
    files = (METRICS, *(f"{ADAPTER}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)))

    @property
    def keeps_weights(self) -> bool:
        """Whether the last checkpoint of a finished run is kept."""
        return self._settings.keep_weights

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
        """Returns where the kept samples are in the data; ValueError if not all are there."""
        return kept_rows("instructions", self._data.ids, kept)

    @staticmethod
    def said(result: LoraResult) -> str:
        """Returns the line to print at the end of a run."""
        loss = "" if result.test_loss is None else f"test loss {result.test_loss:.4f}, "
        return f"{loss}{result.num_kept} samples, {result.seconds:.1f} s"

    def complete(self, workspace: Workspace) -> None:
        """Writes the merged model of a finished run, where it is asked for."""
        if self._settings.merge:
            workspace.ensure(MergedStep(self._model, workspace.root))

    def run(
        self,
        positions: Int64[np.ndarray, " k"],
        seed: int,
        folder: RunFolder | None = None,
    ) -> LoraResult:
        """Trains on these positions, or resumes a stopped run in `folder`.

        Args:
          positions: Ascending, in the data.
          seed: Seed of the adapter's start and of the data order.
          folder: Where the run keeps its state; None: nowhere.
        """
        checks.seed(seed)
        plan = Plan.of(self._settings, positions, seed)
        with contextlib.ExitStack() as stack:
            checkpoints = None
            if folder is not None:
                checkpoints = stack.enter_context(folder.checkpoints())
            progress = self._start(seed, checkpoints)
            progress = self._train(plan, progress, folder, checkpoints)
            if checkpoints is not None:
                checkpoints.wait()
            return self._result(progress, len(positions))

    def write(self, folder: Path, result: LoraResult) -> dict[str, Any]:
        """Writes adapter and metrics of a finished run; returns a summary of its result."""
        write_adapter(result.model, folder / ADAPTER)
        write_metrics(folder, result.history)
        return {
            "num_kept": result.num_kept,
            "test_loss": result.test_loss,
            "seconds": result.seconds,
        }

    def read(self, folder: Path) -> LoraResult:
        """Returns the result of a finished run."""
        record = records.read(folder, records.RUN)
        assert record is not None  # it is finished
        summary = record.facts[records.RESULT]
        return LoraResult(
            model=load_adapter(self._model, folder / ADAPTER),
            num_kept=summary["num_kept"],
            test_loss=summary.get("test_loss"),
            history=read_metrics(folder),
            seconds=summary["seconds"],
        )

    @property
    def _is_shared(self) -> bool:
        """Whether several processes train together."""
        return self._mesh is not None and self._mesh.is_multi_process

    @property
    def _mesh(self) -> Mesh | None:
        return mesh_of(self._model.params)

    def _start(self, seed: int, checkpoints: Checkpoints | None) -> Progress:
        """Returns where a run begins, in all processes: new, or where the first one left it."""
        progress = Progress.start(initial_adapter(self._architecture, seed), self._optimiser)
        if checkpoints is not None:
            progress = Progress.of(checkpoints.restore(progress.state)) or progress
        if (mesh := self._mesh) is None:
            return progress
        return Progress.of(from_first(mesh, progress.state, progress.told)) or progress

    def _train(
        self,
        plan: Plan,
        progress: Progress,
        folder: RunFolder | None,
        checkpoints: Checkpoints | None,
    ) -> Progress:
        num_steps = len(plan.rates)
        bar = tqdm(
            total=num_steps,
            initial=progress.step,
            desc="fine-tuning",
            unit="step",
            leave=False,
            disable=hides_bar(self._progress),
        )
        may_stop = checkpoints is not None or self._is_shared
        with bar, stopping.at_steps() if may_stop else contextlib.nullcontext():
            for step in range(progress.step, num_steps):
                progress = self._step(plan, progress, step)
                ends = (step + 1) % plan.steps_per_epoch == 0
                if ends:
                    progress = progress.epoch_ended(plan, step)
                leaves = stopping.is_due()
                if checkpoints is not None and folder is not None:
                    if ends or leaves or (step + 1) % self._settings.checkpoint_steps == 0:
                        checkpoints.save(step + 1, progress.state, progress.told)
                    if ends:
                        folder.write_metrics(progress.history)
                bar.update()
                if leaves:
                    if checkpoints is not None:
                        checkpoints.wait()
                    stopping.stop_together()
        return progress

    def _step(self, plan: Plan, progress: Progress, step: int) -> Progress:
        start = time.perf_counter()
        state, some = progress.state, plan.positions_of(step)
        params, settings = self._model.params, self._settings
        sums = on_every_device(params, Sums.zero(state.adapter))
        rows_at_once = whole_rows(params, settings.rows_at_once)
        batches = rows_of_step(
            self._data, some, rows_at_once, self._max_length, packing=settings.packing
        )
        num_tokens = 0
        for rows in batches:
            num_tokens += int(rows.counts.sum())
            rows = over_devices(params, rows)
            sums = add_rows(self._architecture, params, state.adapter, rows, sums)
        loss = float(fetch(sums.loss))
        if not np.isfinite(loss):
            raise checks.SharedError(
                f"fine-tuning gave a loss ({loss}) that is not finite, at step {step + 1}, "
                f"learning rate {plan.rates[step]:g}; try a smaller lora.learning_rate, such as a "
                "tenth of it."
            )
        state = take_step(
            self._optimiser,
            state,
            sums.gradients,
            jnp.float32(num_tokens),
            jnp.float32(plan.rates[step]),
        )
        num_read = sum(len(self._data.tokens[i]) for i in some)
        return progress.after(state, loss, num_tokens, num_read, time.perf_counter() - start)

    def _result(self, progress: Progress, num_kept: int) -> LoraResult:
        model = self._model.with_adapter(self._settings.adapter, progress.state.adapter)
        _check_finite(progress)
        test_loss = None
        if self._test is not None:
            losses = response_losses(
                model, self._test, tokens_per_batch=self._tokens_per_batch
            ).astype(np.float64)
            test_loss = float(np.average(losses, weights=self._test.num_response))
        return LoraResult(model, num_kept, test_loss, progress.history, progress.elapsed_s)


@dataclasses.dataclass(frozen=True, eq=False)
class MergedStep:
    """The model with the adapter of a run added, in `merged/` beside it."""

    model: LanguageModel
    root: Path  # folder of the run

    name = "adapter/merged"
    kind = "adapter"
    stage = "finetune"
    obsolete = ()
    files = (f"{MERGED}/config.json",)

    @property
    def key(self) -> dict[str, Any]:
        run = records.read(self.root, records.RUN)
        assert run is not None  # it is finished
        adapter = {name: sha for name, sha in run.outputs.items() if name.startswith(ADAPTER)}
        return {"model": self.model.fingerprint, "adapter": adapter}

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def compute(self, scratch: Path) -> LanguageModel:
        return load_adapter(self.model, self.root / ADAPTER)

    def write(self, root: Path, model: LanguageModel) -> Written:
        write_merged(model, root / MERGED)
        return Written(f"{MERGED}/{name}" for name in artefacts.names_below(root / MERGED))


def _check_finite(progress: Progress) -> None:
    """Raises ValueError if the last step left NaN or infinity, which no later loss would show."""
    for path, leaf in by_path(progress.state.adapter).items():
        if not np.isfinite(fetch(leaf)).all():
            raise checks.SharedError(
                f"fine-tuning gave an adapter with NaN or infinite values ({path}) at its last "
                "step; try a smaller lora.learning_rate, such as a tenth of it."
            )


def _check_lengths(name: str, data: Tokenised, max_length: int) -> None:
    lengths = np.array([len(row) for row in data.tokens])
    longest = int(lengths.argmax())
    if lengths[longest] > max_length:
        raise checks.InputError(
            f"{name}: sample {data.ids[longest]!s} has {lengths[longest]} tokens, expected at most "
            f"{max_length}; tokenise with max_length={max_length}."
        )
