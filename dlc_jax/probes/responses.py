"""What a language model, not masked, says of responses: losses of tokens, and embeddings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dlc_jax import expect
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import Run
from dlc_jax.encoders.causal_model import CausalModel
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.encoders.rotations import places_in_sequence
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH, BatchPlan, placed
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.probes.shards import Arrays
from dlc_jax.probes.text_work import TextWork, mean_losses
from dlc_jax.types import Params, ResponseLosses

_RESPONSE = "### Response:"  # what Cherry LLM scores responses behind


def measure_responses(
    model: LanguageModel,
    data: Instructions,
    *,
    max_length: int | None = None,
    tokens: Tokenised | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_corrupt: str = "error",
    with_features: bool = False,
    run: Run = Run(),
) -> ResponseLosses:
    """Measures responses with and without their prompts, for scores that are compared with DLC.

    All losses are of the same text: of a response that was cut off with its prompt before it, only
    the tokens that were left are measured without it. Alone, the first token counts where the
    tokenizer has a begin of sequence to predict it from. `after_prefix` has the prompt replaced by
    its end from `### Response:` on, or, of a prompt that ends otherwise, by `### Response:` and a
    newline. Where responses have several turns, neither is measured.

    Everything is of one pass over the data.

    Args:
      model: From `load_language_model`.
      data: From `load_instructions`.
      max_length, on_corrupt: As for `tokenise`; None: 2048, or the model's limit if it is lower.
      tokens: What `tokenise` gives of these data with the same arguments, where that was done.
      with_features: Whether to return what `response_features` does as well.
      tokens_per_batch, run: As for `response_losses`.
    Raises:
      ValueError: see `tokenise` and `response_losses`.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> responses = dlc.measure_responses(model, data, max_length=64)
      >>> responses.num_tokens.tolist()
      [25, 24, 27, 25]
      >>> np.round(responses.losses, 2)
      array([5.71, 4.96, 5.09, 4.65], dtype=float32)
    """
    expect.is_a(Run, run=run)
    max_length = model.max_length(max_length)
    if tokens is None:
        tokens = tokenise(data, model.tokenizer, max_length, on_corrupt=on_corrupt)
    kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
    model.check_tokens(tokens.named)
    num = len(tokens)
    measured = functools.partial(
        _measured_tokens,
        model,
        num_features=num if with_features else 0,
        tokens_per_batch=tokens_per_batch,
        run=run,
    )
    found = functools.partial(ResponseLosses, num_tokens=tokens.num_response, ids=tokens.ids)
    if tokens.others is not None:
        losses, _, features = measured(tokens)
        return found(losses, alone=None, features=features)
    # texts that hold their special tokens take the begin of sequence with them
    begin = (model.tokenizer.bos_token or "") if kept.has_special_tokens else ""
    bare = kept.without_prompts(begin)
    prompts = [b + _prefix(p) for b, p in zip(bare.prompts, kept.prompts, strict=True)]
    alone = _cut_like(tokens, tokenise(bare, model.tokenizer, max_length))
    prefixed = dataclasses.replace(kept, prompts=tuple(prompts))
    longest = max_length + max(map(len, prompts))  # a token has a character or more
    after_prefix = _cut_like(tokens, tokenise(prefixed, model.tokenizer, longest))
    # one after the other, so that they share programs
    losses, of_tokens, features = measured(Tokenised.joined([tokens, alone, after_prefix]))
    changes = [
        _changes(_Ending.of(tokens, i, of_tokens[i]), _Ending.of(alone, i, of_tokens[num + i]))
        for i in range(num)
    ]
    return found(
        losses[:num],
        alone=losses[num : 2 * num],
        after_prefix=losses[2 * num :],
        changes=tuple(changes),
        features=features,
    )


class _Ending(NamedTuple):
    """The tokens of a response that have a loss, from the last one backwards.

    Attributes:
      ids: Ids of these tokens.
      losses: Loss of each, in nats.
      was_cut: Whether more would follow.
    """

    ids: Int[np.ndarray, " _"]
    losses: Float32[np.ndarray, " _"]
    was_cut: bool

    @classmethod
    def of(cls, data: Tokenised, position: int, losses: Float32[np.ndarray, " _"]) -> _Ending:
        ids = data.tokens[position][data.counts(position)]
        # only the first token of a sequence has none
        ids = ids[len(ids) - len(losses) :]
        return cls(ids[::-1], losses[::-1], bool(data.truncated[position]))

    def without(self, num: int) -> _Ending:
        """Returns it without its last tokens."""
        return self._replace(ids=self.ids[num:], losses=self.losses[num:])


_MOST_MERGED = 4  # tokens that a tokenizer may join, at the boundary to the prompt


def _changes(given: _Ending, alone: _Ending) -> Float32[np.ndarray, " _"]:
    """Returns the losses given the prompt minus those without it, of tokens that are in both.

    A tokenizer may join the first characters of a response with what is before them; where both
    were cut at as many tokens, they then end at different ones.
    """
    shifts = range(-_MOST_MERGED, _MOST_MERGED + 1) if given.was_cut else [0]
    pairs = [(given.without(max(shift, 0)), alone.without(max(-shift, 0))) for shift in shifts]
    num, (a, b) = max(
        ((_num_equal(a.ids, b.ids), (a, b)) for a, b in pairs), key=lambda found: found[0]
    )
    return (a.losses[:num] - b.losses[:num])[::-1]


def _num_equal(a: Int[np.ndarray, " _"], b: Int[np.ndarray, " _"]) -> int:
    """Returns how many are equal before the first that is not."""
    num = min(len(a), len(b))
    differ = np.flatnonzero(a[:num] != b[:num])
    return int(differ[0]) if differ.size else num


def response_features(
    model: LanguageModel,
    data: Tokenised,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    run: Run = Run(),
) -> Float32[np.ndarray, "n d"]:
    """Embeds each sample: the mean of the model's last layer over prompt and response.

    The i-th token has weight i: later ones have seen more.

    Args:
      model, data: As for `response_losses`.
      tokens_per_batch, run: As for `response_losses`.
    Returns:
      Not normalised, [n, d] for a model of width d; for `dlc.similarities` and selectors.
    Raises:
      ValueError: see `response_losses`.
    Sources: Muennighoff 2022, SGPT, arXiv 2202.08904; Ivison et al. 2025, arXiv 2503.01807, whose
      RDS+ it is.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> dlc.response_features(model, dlc.tokenise(data, model.tokenizer, max_length=64)).shape
      (4, 192)
    """
    expect.is_a(Run, run=run)
    work = TextWork.of(model, data, tokens_per_batch, ["features"], run)
    of_rows = functools.partial(_features, model.architecture, work.most_in_row, model.params)

    def read(plan: BatchPlan, pooled: np.ndarray) -> Arrays:
        return {"features": _of_samples(data, plan, pooled, len(data))}

    features = np.empty((len(data), _width(model)), np.float32)
    for positions, found in work.done(of_rows, read):
        features[positions] = found["features"].T
    return features


def _measured_tokens(
    model: LanguageModel,
    data: Tokenised,
    *,
    num_features: int,
    tokens_per_batch: int,
    run: Run,
) -> tuple[
    Float32[np.ndarray, " n"], list[Float32[np.ndarray, " _"]], Float32[np.ndarray, "f d"] | None
]:
    """Returns mean losses, those of every token of a response, and features of the first samples.

    Tokens that are the first of a sequence have no loss.
    """
    work = TextWork.of(model, data, tokens_per_batch, ["tokens", num_features], run)
    named = (model.architecture, work.most_in_row if num_features else 0, model.params)
    of_rows = functools.partial(_losses_and_features, *named)

    def read(plan: BatchPlan, found: tuple[np.ndarray, np.ndarray | None]) -> Arrays:
        of_token, pooled = found
        of_responses = work.of_responses(plan, of_token)
        arrays = {
            "losses": mean_losses(of_responses),
            "tokens": np.concatenate(of_responses, axis=1),
        }
        if pooled is not None:
            arrays["features"] = _of_samples(data, plan, pooled, num_features)
        return arrays

    losses = np.empty(len(data), np.float32)
    of_tokens: list[Any] = [None] * len(data)
    features = np.empty((num_features, _width(model)), np.float32) if num_features else None
    for positions, arrays in work.done(of_rows, read):
        losses[positions] = arrays["losses"][0]
        ends = np.cumsum([data.counts(position)[1:].sum() for position in positions])
        parts = np.split(arrays["tokens"][0], ends[:-1])
        for position, part in zip(positions, parts, strict=True):
            of_tokens[position] = part
        if features is not None:
            features[[p for p in positions if p < num_features]] = arrays["features"].T
    return losses, of_tokens, features


def _of_samples(
    data: Tokenised, plan: BatchPlan, pooled: Float32[np.ndarray, "1 b k d"], num: int
) -> Float32[np.ndarray, "d r"]:
    """Returns what was pooled of the samples that are among the first `num` of the data."""
    places = [place for place in placed(data, plan.rows) if place.position < num]
    return pooled[0, [p.row for p in places], [p.number - 1 for p in places]].T


def _prefix(prompt: str) -> str:
    if prompt.rstrip().endswith(_RESPONSE):
        return prompt[prompt.rindex(_RESPONSE) :]
    return f"{_RESPONSE}\n"


def _cut_like(tokens: Tokenised, other: Tokenised) -> Tokenised:
    """Returns the responses behind other prompts, cut off where `tokens` are."""
    left = other.num_prompt + tokens.num_response
    whole = [len(row) for row in other.tokens]
    # at least two, since the first token of all has no loss
    return other.cut(np.where(tokens.truncated, np.maximum(left, 2), whole))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses_and_features(
    architecture: CausalModel,
    most: int,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
) -> tuple[Float32[Array, "1 b s"], Float32[Array, "1 b k d"] | None]:
    """Returns losses of tokens, and the features of `most` samples of each row; 0: none."""
    hidden = architecture.hidden(params, tokens, segments)
    losses = architecture.cross_entropies(params, hidden[:, :-1], tokens[:, 1:])
    return losses[None], _pooled(hidden, segments, most) if most else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(
    architecture: CausalModel,
    most: int,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
) -> Float32[Array, "1 b k d"]:
    return _pooled(architecture.hidden(params, tokens, segments), segments, most)


def _pooled(
    hidden: Float[Array, "b t d"], segments: Int[Array, "b t"], most: int
) -> Float32[Array, "1 b k d"]:
    """Returns the mean over the tokens of each sample of a row, the i-th of which has weight i."""
    weights = (places_in_sequence(segments) + 1).astype(jnp.float32)
    of_sample = jax.nn.one_hot(segments - 1, most, axis=1) * weights[:, None]
    of_sample /= jnp.maximum(of_sample.sum(axis=2, keepdims=True), 1)
    wide = hidden.astype(jnp.float32)
    return jnp.matmul(of_sample, wide, precision=jax.lax.Precision.HIGHEST)[None]


def _width(model: LanguageModel) -> int:
    """Returns how many features a token has in the model's last layer."""
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.architecture.hidden, model.params, row, row).shape[-1]
