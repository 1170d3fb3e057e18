"""Log-likelihoods that a language model gives to continuations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Int64
from tqdm import tqdm

from dlc_jax import expect, signals
from dlc_jax.distributed import fetch, hides_bar, on_every_device, over_devices
from dlc_jax.encoders.causal_model import CausalModel
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.preprocess.token_batches import (
    TOKENS_PER_BATCH,
    BatchPlan,
    bucket_length,
    make_rows,
    placed,
    plan_batches,
)
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.types import Params

_PLACES_AT_ONCE = 128  # logits of a whole batch would be gigabytes
_NO_LIMIT = 1 << 30  # of what one batch judges

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, ids of its continuation


class Likelihoods(NamedTuple):
    """What a model gives to continuations of contexts.

    Attributes:
      sums: Log-probabilities of the continuations' tokens, summed, in nats; at most 0.
      is_greedy: Whether each of these tokens is the likeliest.
      num_cut: Tokens of the context, counted from its beginning, that the model has no room for.
    """

    sums: Float32[np.ndarray, " k"]
    is_greedy: Bool[np.ndarray, " k"]
    num_cut: Int64[np.ndarray, " k"]


class _Places(NamedTuple):
    """Predictions that are judged, one per token of a continuation.

    Attributes:
      pairs: To which a token belongs.
      rows: Distinct input that predicts it.
      places: After which position of the input.
      targets: The token.
    """

    pairs: Int64[np.ndarray, " s"]
    rows: Int64[np.ndarray, " s"]
    places: Int64[np.ndarray, " s"]
    targets: Int64[np.ndarray, " s"]


def continuation_log_likelihoods(
    model: LanguageModel,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> Likelihoods:
    """Measures how likely each continuation is after its context.

    Pairs that differ in nothing but the last token, such as the letters of a multiple choice, share
    one pass through the model.

    Args:
      model: From `load_language_model`.
      pairs: Ids of contexts and of their continuations, at least one each.
      max_length: Most tokens that the model reads at once; None: its own limit. The last token is
        predicted, never read, so that one more has room. Contexts are cut from the left.
      tokens_per_batch: Inputs times padded length of a program call; changes speed and memory.
      progress: Whether to show a bar.
    Raises:
      ValueError: an empty context or continuation, ids out of the vocabulary, a continuation of
        more than `max_length` tokens.
    """
    max_length = longest_input(model, max_length)
    expect.at_least("tokens_per_batch", tokens_per_batch, 1)
    _check(model, pairs, max_length)
    num_cut = np.array([max(0, len(a) + len(b) - 1 - max_length) for a, b in pairs], np.int64)
    inputs, judged = _laid_out(pairs, num_cut)
    logs = np.zeros(len(judged.pairs))
    is_likeliest = np.ones(len(judged.pairs), bool)
    with tqdm(
        total=len(inputs), desc="likelihoods", unit="row", disable=hides_bar(progress)
    ) as bar:
        data = _as_data(inputs)
        for plan, chosen, width in _batches(data, judged, tokens_per_batch):
            signals.poll()
            arrays = _arrays(model.params, data, plan, judged, np.resize(chosen, width))
            found = _judged(model.architecture, model.params, *arrays)
            logs[chosen], is_likeliest[chosen] = (fetch(x)[: len(chosen)] for x in found)
            bar.update(len(plan.positions))
    sums = np.bincount(judged.pairs, logs, minlength=len(pairs)).astype(np.float32)
    misses = np.bincount(judged.pairs[~is_likeliest], minlength=len(pairs))
    return Likelihoods(sums, misses == 0, num_cut)


def longest_input(model: LanguageModel, asked: int | None) -> int:
    """Returns how many tokens are read at once; ValueError if it is over the model's limit."""
    limit = model.config.max_length
    if asked is None:
        return limit
    expect.integer("max_length", asked, 1)
    expect.at_most(f"max_length, of {model.name}", asked, limit)
    return asked


def _check(model: LanguageModel, pairs: Sequence[Pair], max_length: int) -> None:
    for number, (context, continuation) in enumerate(pairs):
        where = f"pair {number}"
        for name, ids in (("context", context), ("continuation", continuation)):
            if len(ids) == 0:
                raise expect.InputError(f"{where}: its {name} has no token, expected at least one.")
        if len(continuation) > max_length:
            raise expect.InputError(
                f"{where}: its continuation has {len(continuation)} tokens, expected at most "
                f"{max_length}, the longest sequence of the model."
            )
        model.check_tokens([(where, context), (where, continuation)])


def _laid_out(
    pairs: Sequence[Pair], num_cut: Int64[np.ndarray, " k"]
) -> tuple[list[Int32[np.ndarray, " _"]], _Places]:
    """Returns the distinct inputs, and what is judged in them."""
    numbers: dict[bytes, int] = {}
    inputs: list[np.ndarray] = []
    parts = [np.zeros((4, 0), np.int64)]
    for number, (context, continuation) in enumerate(pairs):
        whole = np.array([*context, *continuation], np.int32)[num_cut[number] :]
        read = whole[:-1]
        row = numbers.setdefault(read.tobytes(), len(inputs))
        if row == len(inputs):
            inputs.append(read)
        places = np.arange(len(read) - len(continuation), len(read))
        parts.append(np.stack(np.broadcast_arrays(number, row, places, whole[places + 1])))
    return inputs, _Places(*np.concatenate(parts, axis=1))


def _as_data(inputs: list[Int32[np.ndarray, " _"]]) -> Tokenised:
    zeros = np.zeros(len(inputs), np.int32)
    return Tokenised(tuple(inputs), zeros, zeros.astype(bool), np.arange(len(inputs)).astype(str))


def _batches(
    data: Tokenised, judged: _Places, tokens_per_batch: int
) -> Iterator[tuple[BatchPlan, Int64[np.ndarray, " s"], int]]:
    """Yields batches, which judgements are in each, and to how many these are to be padded."""
    if not len(data):
        return
    order = np.argsort(judged.rows, kind="stable")
    of_input = np.split(order, np.searchsorted(judged.rows[order], np.arange(1, len(data))))
    plans = plan_batches(data, tokens_per_batch)
    found = [np.concatenate([of_input[i] for i in plan.positions]) for plan in plans]
    widths: dict[int, int] = {}  # one program per length of rows
    for plan, chosen in zip(plans, found, strict=True):
        widths[plan.length] = max(widths.get(plan.length, 0), len(chosen))
    for plan, chosen in zip(plans, found, strict=True):
        yield plan, chosen, bucket_length(widths[plan.length], _NO_LIMIT)


def _arrays(
    params: Params,
    data: Tokenised,
    plan: BatchPlan,
    judged: _Places,
    chosen: Int64[np.ndarray, " s"],
) -> tuple[Array, ...]:
    """Returns what `_judged` takes of a batch for these judgements."""
    rows, starts = np.zeros((2, len(data)), np.int64)
    for place in placed(data, plan.rows):
        rows[place.position], starts[place.position] = place.row, place.tokens.start
    tokens, segments = over_devices(params, make_rows(data, *plan))
    inputs = judged.rows[chosen]
    others = (rows[inputs], starts[inputs] + judged.places[chosen], judged.targets[chosen])
    places = tuple(jnp.asarray(some, jnp.int32) for some in others)
    return jnp.asarray(tokens), jnp.asarray(segments), *on_every_device(params, places)


@functools.partial(jax.jit, static_argnums=0)
def _judged(
    architecture: CausalModel,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    rows: Int[Array, " s"],
    places: Int[Array, " s"],
    targets: Int[Array, " s"],
) -> tuple[Float32[Array, " s"], Bool[Array, " s"]]:
    """Returns log-probabilities of targets after places of rows, and which are the likeliest."""
    hidden = architecture.hidden(params, tokens, segments)

    def of_place(place: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = architecture.logits(params, place[0]).astype(jnp.float32)
        log_probability = logits[place[1]] - jax.nn.logsumexp(logits)
        return log_probability, logits.argmax() == place[1]

    return jax.lax.map(of_place, (hidden[rows, places], targets), batch_size=_PLACES_AT_ONCE)
