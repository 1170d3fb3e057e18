"""Response losses of a language model, unmasked or under every probe."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from tqdm import tqdm

from dlc_jax import checks
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import over_devices
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.masking import (
    MASKINGS,
    check_path,
    path_counts,
)
from dlc_jax.masking.importance import Importance
from dlc_jax.masking.thresholds import Thresholds, masked
from dlc_jax.preprocess.tokens import TokenBatch, Tokenised, token_batches, tokenise
from dlc_jax.probes.path import learning_path
from dlc_jax.types import Params, ProbeLosses, ResponseLosses


def response_losses(
    model: LanguageModel,
    data: Tokenised,
    *,
    tokens_per_batch: int = 8192,
    progress: bool = False,
) -> Float32[np.ndarray, " n"]:
    """Measures the mean cross-entropy of each response given its prompt.

    Args:
      model: From `load_language_model`.
      data: From `tokenise`.
      tokens_per_batch: Rows times padded length of a program call; changes speed and memory.
      progress: Whether to show a bar.
    Returns:
      In nats per token of the response; the prompt's tokens do not count.
    """

    def of_batch(batch: TokenBatch) -> Array:
        arrays = over_devices(model.params, batch[1:])
        return _losses(model.architecture, model.params, *arrays)[None]

    return _measured(data, of_batch, 1, tokens_per_batch, progress)[0]


def measure_responses(
    model: LanguageModel,
    data: Instructions,
    *,
    max_length: int | None = None,
    tokens: Tokenised | None = None,
    tokens_per_batch: int = 8192,
    on_corrupt: str = "error",
    progress: bool = False,
) -> ResponseLosses:
    """Measures responses with and without their prompts, for scores that are compared with DLC.

    Both losses are of the same text: of a response that was cut off with its prompt before it, only
    the tokens that were left are measured alone. Alone, the first token counts where the tokenizer
    has a begin of sequence to predict it from.

    Args:
      model: From `load_language_model`.
      data: From `load_instructions`.
      max_length, on_corrupt: As for `tokenise`; None: 2048, or the model's limit if it is lower.
      tokens: What `tokenise` gives of these data with the same arguments, where that was done.
      tokens_per_batch, progress: As for `response_losses`.
    Raises:
      ValueError: see `tokenise`.
    """
    max_length = model.max_length(max_length)
    measured = functools.partial(
        response_losses, model, tokens_per_batch=tokens_per_batch, progress=progress
    )
    if tokens is None:
        tokens = tokenise(data, model.tokenizer, max_length, on_corrupt=on_corrupt)
    kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
    alone = _alone(kept, model, tokens, max_length)
    return ResponseLosses(
        losses=measured(tokens),
        alone=measured(alone),
        num_tokens=tokens.num_response,
        ids=tokens.ids,
    )


def _alone(
    data: Instructions, model: LanguageModel, tokens: Tokenised, max_length: int
) -> Tokenised:
    """Returns the responses without their prompts, cut off where `tokens` are."""
    # texts that hold their special tokens take the begin of sequence with them
    begin = (model.tokenizer.bos_token or "") if data.has_special_tokens else ""
    alone = tokenise(data.without_prompts(begin), model.tokenizer, max_length)
    left = alone.num_prompt + tokens.num_response
    # at least two, since the first token of all has no loss
    return alone.cut(np.where(tokens.truncated, np.maximum(left, 2), max_length))


def probe_responses(
    model: LanguageModel,
    data: Tokenised,
    *,
    schedule: str = "linear",
    step: float = 0.02,
    num_probes: int = 8,
    placement: str = "midpoint",
    max_sparsity: float = 1.0,
    masking: str = "l1",
    tokens_per_batch: int = 8192,
    seed: int = 0,
    progress: bool = False,
) -> ProbeLosses:
    """Measures the response losses of masked copies of the model.

    Args:
      model, data: As for `response_losses`.
      schedule, step, num_probes, placement, max_sparsity, masking, seed: As for `probe`.
      tokens_per_batch, progress: As for `response_losses`.
    Returns:
      Losses [m, n] in nats, higher is harder. All samples are one class, without a prototype.
    Raises:
      ValueError: an unknown name, a value out of range, or losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    """
    check_path(schedule, step, num_probes, placement, max_sparsity)
    checks.one_of("probe.masking", masking, MASKINGS)
    checks.seed(seed)
    counts = functools.partial(
        path_counts,
        schedule=schedule,
        step=step,
        num_probes=num_probes,
        placement=placement,
        max_sparsity=max_sparsity,
    )
    path = learning_path(model, counts, masking, seed, "default")
    thresholds = jax.device_put(path.thresholds)

    def of_batch(batch: TokenBatch) -> Array:
        arrays = over_devices(model.params, batch[1:])
        return _probe_losses(
            model.architecture, path.prunable, model.params, path.importance, thresholds, *arrays
        )

    losses = _measured(data, of_batch, len(path), tokens_per_batch, progress)
    checks.losses_are_finite(losses, data.ids)
    return ProbeLosses(
        losses=losses,
        sparsity=path.sparsity,
        labels=np.zeros(len(data), np.int32),
        ids=data.ids,
        prototypes=np.zeros((1, 0), np.float32),
        class_names=("all",),
        skipped=data.skipped,
    )


def _measured(
    data: Tokenised, of_batch, num_rows: int, tokens_per_batch: int, progress: bool
) -> Float32[np.ndarray, "m n"]:
    checks.at_least("tokens_per_batch", tokens_per_batch, 1)
    found = np.empty((num_rows, len(data)), np.float32)
    with tqdm(
        total=len(data), desc="losses", unit="row", disable=None if progress else True
    ) as bar:
        for batch in token_batches(data, tokens_per_batch):
            found[:, batch.positions] = np.asarray(of_batch(batch))[:, : len(batch.positions)]
            bar.update(len(batch.positions))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe_losses(
    architecture: Architecture,
    prunable: tuple[str, ...],
    params: Params,
    importance: Importance,
    thresholds: Thresholds,
    tokens: Int[Array, "b t"],
    num_tokens: Int[Array, " b"],
    num_prompt: Int[Array, " b"],
) -> Float32[Array, "m b"]:
    def one_probe(threshold: Thresholds) -> Float32[Array, " b"]:
        # keeps XLA from computing the importance of all weights ahead of the loop: four bytes each
        frozen, threshold = jax.lax.optimization_barrier((params, threshold))
        copy = masked(frozen, prunable, importance, threshold)
        return _response_losses(architecture, copy, tokens, num_tokens, num_prompt)

    return jax.lax.map(one_probe, thresholds)


def _response_losses(
    architecture: Architecture,
    params: Params,
    tokens: Int[Array, "b t"],
    num_tokens: Int[Array, " b"],
    num_prompt: Int[Array, " b"],
) -> Float32[Array, " b"]:
    """Returns the mean cross-entropy over tokens num_prompt .. num_tokens - 1 of each row."""
    place = jnp.arange(tokens.shape[1])
    is_token = place < num_tokens[:, None]
    hidden = architecture.hidden(params, tokens, is_token.astype(jnp.int32))
    of_token = architecture.cross_entropies(params, hidden[:, :-1], tokens[:, 1:])
    counts = (is_token & (place >= num_prompt[:, None]))[:, 1:]
    return jnp.where(counts, of_token, 0).sum(axis=1) / counts.sum(axis=1)


_losses = jax.jit(_response_losses, static_argnums=0)
