"""Response losses of a language model, unmasked or under every probe."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from dlc_jax import distributed, expect
from dlc_jax.distributed import Run
from dlc_jax.encoders.causal_model import CausalModel
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.masking import (
    Importance,
    PathSpec,
    Thresholds,
    deferred_masks,
    masked,
    masked_by_layer,
)
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.probes.path import LearningPath, learning_path, measured_path
from dlc_jax.probes.text_work import TextWork
from dlc_jax.types import Conventions, Params, ProbeLosses, overridden

RESPONSES_PATH = PathSpec(num_probes=8, placement="midpoint")


def response_losses(
    model: LanguageModel,
    data: Tokenised,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    run: Run = Run(),
) -> Float32[np.ndarray, " n"]:
    """Measures the mean cross-entropy of each response given its prompt.

    Args:
      model: From `load_language_model`.
      data: From `tokenise`.
      tokens_per_batch: Rows times padded length of a program call, for each part of the axis `data`
        of the model's mesh; changes speed and memory.
      run: Folder, mesh and bars; see `Run`. The mesh is of all processes, where several share the
        work, each with a model on its own part of it (`Team.of(mesh).mesh`); None: this process
        does all of it.
    Returns:
      In nats per token of the response; the prompt's tokens do not count.
    Raises:
      ValueError: processes without a folder to share; by sample, tokens that the model does not
        have.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> np.round(dlc.response_losses(model, tokens), 2)
      array([5.71, 4.96, 5.09, 4.65], dtype=float32)
    """
    expect.is_a(Run, run=run)
    work = TextWork.of(model, data, tokens_per_batch, ["losses"], run)
    of_rows = functools.partial(_losses, model.architecture, model.params)
    return work.measured(lambda *rows: of_rows(*rows)[None], 1)[0]


def probe_responses(
    model: LanguageModel,
    data: Tokenised,
    *,
    schedule: str | None = None,
    step: float | None = None,
    num_probes: int | str | None = None,
    masking: str | None = None,
    seed: int = 0,
    path: PathSpec | None = None,
    mode: str = "default",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    run: Run = Run(),
) -> ProbeLosses:
    """Measures the response losses of masked copies of the model.

    Of weights that are equal at a threshold, the first are zeroed. torch's global pruning zeroes as
    many but others: with half-precision checkpoints losses differ from torch's by 3e-3 to 2e-2.

    Args:
      model, data: As for `response_losses`.
      schedule, step, num_probes, masking: Instead of those in `path`.
      seed: Seed of random masking.
      path: Which masked copies; see `PathSpec`. One that is given stands for all of the default,
        `PathSpec(num_probes=8, placement="midpoint")`. The schedule is `linear` unless named.
      mode: `default`, or `official`, whose path cannot be chosen: three probes as in the released
        code, of sparsity 0, 0.2 and 0.2 again, the smallest weights of every linear layer apart,
        the head too, ties as in torch on a CPU. An embedding that is the head is masked as both.
      tokens_per_batch, run: As for `response_losses`.
    Returns:
      Losses [m, n] in nats, higher is harder. All samples are one class, without a prototype.
    Raises:
      ValueError: an unknown name, a value out of range, tokens that the model does not have, by
        sample, or losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> probes = dlc.probe_responses(model, tokens, num_probes=2)
      >>> first, last = probes.losses.mean(axis=1)  # the last masks more
      >>> probes.losses.shape, bool(first < last)
      ((2, 4), True)
    """
    expect.is_a(Run, run=run)
    asked = {"schedule": schedule, "step": step, "num_probes": num_probes, "masking": masking}
    if Conventions.of(mode, "instructions").reads_as_released:
        for name, value in (asked | {"path": path}).items():
            if value is not None:
                raise expect.InputError(
                    f"{name}: mode {mode!r} has one path only; expected None, got {value!r}."
                )
        return _probed_as_released(model, data, tokens_per_batch, run)
    path = RESPONSES_PATH if path is None else path
    expect.is_a(PathSpec, path=path)
    if path.augment:
        raise expect.InputError("probe.augment: instructions have no crops; expected False.")
    path = overridden(path, **asked).for_mode("default")
    expect.seed(seed)
    model.check_tokens(data.named)  # before the path, which takes a pass over the weights
    probes = learning_path(model, path, seed, Conventions.of("default"))
    decisive = [path.schedule, path.step, path.num_probes, path.placement, path.max_sparsity]
    work = TextWork.of(model, data, tokens_per_batch, [*decisive, path.masking, seed], run)

    def losses_of(some: LearningPath, suffix: str) -> dict[str, Float32[np.ndarray, "k n"]]:
        thresholds = distributed.on_every_device(model.params, some.thresholds)
        masks = (some.prunable, model.params, some.importance, thresholds)
        of_rows = functools.partial(_probe_losses, model.architecture, *masks)
        return {"losses": work.measured(of_rows, len(some), suffix)}

    return measured_path(path, probes, losses_of, **_as_one_class(data))


def _as_one_class(data: Tokenised) -> dict[str, Any]:
    """Returns what `ProbeLosses` has of the samples."""
    return {
        "labels": np.zeros(len(data), np.int32),
        "ids": data.ids,
        "prototypes": np.zeros((1, 0), np.float32),
        "class_names": ("all",),
        "skipped": data.skipped,
    }


_RELEASED_SHARE = 0.2  # that each step of the released code zeroes


def _probed_as_released(
    model: LanguageModel, data: Tokenised, tokens_per_batch: int, run: Run
) -> ProbeLosses:
    work = TextWork.of(model, data, tokens_per_batch, ["as released"], run)

    def losses_of(params: Params, suffix: str) -> Float32[np.ndarray, "1 n"]:
        of_rows = functools.partial(_losses, model.architecture, params)
        return work.measured(lambda *rows: of_rows(*rows)[None], 1, suffix)

    first = losses_of(model.params, "-0")
    masked, sparsity = masked_by_layer(model.params, model.architecture.is_linear, _RELEASED_SHARE)
    second = losses_of(masked, "-1")
    # the second step finds the zeros of the first, and zeroes the same weights
    losses = np.concatenate([first, second, second])
    expect.losses_are_finite(losses, data.ids)
    sparsities = np.array([0, sparsity, sparsity], np.float32)
    return ProbeLosses(losses, sparsities, steps=np.arange(3), num_steps=3, **_as_one_class(data))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe_losses(
    architecture: CausalModel,
    prunable: tuple[str, ...],
    params: Params,
    importance: Importance,
    thresholds: Thresholds,
    *rows: Int[Array, "b t"],
) -> Float32[Array, "m b s"]:
    def one_probe(threshold: Thresholds) -> Float32[Array, "b s"]:
        # as in `kernel`: the importance of all weights would be four bytes each
        frozen, threshold = jax.lax.optimization_barrier((params, threshold))
        mask = deferred_masks if architecture.takes_deferred else masked
        copy = mask(frozen, prunable, importance, threshold)
        return _token_losses(architecture, copy, *rows)

    return jax.lax.map(one_probe, thresholds)


def _token_losses(
    architecture: CausalModel,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
) -> Float32[Array, "b s"]:
    """Returns the cross-entropy of every token but the first of a row."""
    hidden = architecture.hidden(params, tokens, segments)
    return architecture.cross_entropies(params, hidden[:, :-1], tokens[:, 1:])


_losses = jax.jit(_token_losses, static_argnums=0)
