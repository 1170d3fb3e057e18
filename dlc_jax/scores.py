"""Hardness scores by name: DLC, and those of training records and of responses.

Where a probability near 1 counts by what it lacks, that is summed over the other classes: a
difference from 1 would round most easy samples to the same 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dlc_jax import expect
from dlc_jax.types import ProbeLosses, ResponseLosses, TrainingRecord


def dlc(losses: Float[np.ndarray, "m n"]) -> Float32[np.ndarray, " n"]:
    """Returns the mean loss over the probes, in nats; summed in float64.

    Source: Jiang et al. 2025, section 3.
    """
    return losses.mean(axis=0, dtype=np.float64).astype(np.float32)


def check_record(record: TrainingRecord) -> None:
    """Raises ValueError unless shapes agree, labels are in range and values are finite."""
    num_runs, num, num_classes = record.early_logits.shape
    shapes = {
        "correct": (len(record.correct), num),
        "logits": (num, num_classes),
        "early_squared_norms": (num_runs, num),
        "labels": (num,),
        "ids": (num,),
    }
    for name, expected in shapes.items():
        found = getattr(record, name).shape
        if found != expected or 0 in expected:
            raise expect.InputError(
                f"training record: {name} has shape {found}, expected {expected} and no empty "
                f"axis, since early_logits [r, n, c] has {record.early_logits.shape}."
            )
    if record.labels.min() < 0 or record.labels.max() >= num_classes:
        raise expect.InputError(
            f"training record: labels must be in 0..{num_classes - 1}, found "
            f"{record.labels.min()}..{record.labels.max()}."
        )
    for name, values in (
        ("logits", record.logits),
        ("early_logits", record.early_logits.swapaxes(0, 1)),
        ("early_squared_norms", record.early_squared_norms.T),
    ):
        bad = np.flatnonzero(~np.isfinite(values.reshape(num, -1)).all(axis=1))
        if bad.size:
            raise expect.InputError(
                f"training record: {name} of {bad.size} samples are not finite, first of sample "
                f"{record.ids[bad[0]]!s}. Train with a smaller learning rate?"
            )


@functools.partial(jax.jit, static_argnames=("variant",))
def least_confidence(
    logits: Float[Array, "n c"], *, variant: str = "published"
) -> Float32[Array, " n"]:
    """Returns 1 - the highest probability, in [0, 1).

    Args:
      logits: After the last epoch.
      variant: `deepcore` takes minus the highest logit instead, which the scale of the other
        logits does not change.
    Source: Coleman et al. 2020, arXiv 1906.11829.
    """
    if variant == "deepcore":
        return -logits.max(axis=1).astype(jnp.float32)
    return _lacking(jax.nn.softmax(logits.astype(jnp.float32)), logits.argmax(axis=1))


@jax.jit
def entropy(logits: Float[Array, "n c"]) -> Float32[Array, " n"]:
    """Returns the entropy of the predicted distribution in nats, in [0, log c].

    Args:
      logits: After the last epoch.
    Source: Coleman et al. 2020, arXiv 1906.11829.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(jnp.exp(logs) * logs).sum(axis=1)


@jax.jit
def margin(logits: Float[Array, "n c"]) -> Float32[Array, " n"]:
    """Returns 1 - (highest - second highest probability), in [0, 1].

    Args:
      logits: After the last epoch; of a single class the second probability counts as 0.
    Source: Coleman et al. 2020, arXiv 1906.11829.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    highest = jax.lax.top_k(probabilities, min(2, logits.shape[1]))[0]
    lacking = _lacking(probabilities, logits.argmax(axis=1))
    return lacking + highest[:, 1:].sum(axis=1)


@functools.partial(jax.jit, static_argnames=("variant",))
def forgetting(correct: Bool[Array, "e n"], *, variant: str = "published") -> Float32[Array, " n"]:
    """Returns how often a sample went from right to wrong between epochs.

    Args:
      correct: Whether it was classified right when it came up in each epoch.
      variant: A sample that was never right counts as e, more than any other can reach; with
        `deepcore` as 0, as if it was learned at once.
    Source: Toneva et al. 2019, arXiv 1812.05159.
    """
    num_forgotten = (correct[:-1] & ~correct[1:]).sum(axis=0)
    if variant == "published":
        num_forgotten = jnp.where(correct.any(axis=0), num_forgotten, len(correct))
    return num_forgotten.astype(jnp.float32)


@jax.jit
def el2n(early_logits: Float[Array, "r n c"], labels: Int[Array, " n"]) -> Float32[Array, " n"]:
    """Returns the norm of softmax - one-hot label, in [0, sqrt(2)], mean over runs.

    Variant `paper` of the score is this of the logits after the last epoch of one run.

    Args:
      early_logits: Early in training, of several runs.
      labels: Class ids in [0, c).
    Source: Paul et al. 2021, arXiv 2107.07075.
    """
    return _error_norms(early_logits, labels).mean(axis=0)


@functools.partial(jax.jit, static_argnames=("batch_size", "variant"))
def grand(
    early_logits: Float[Array, "r n c"],
    early_squared_norms: Float[Array, "r n"],
    labels: Int[Array, " n"],
    *,
    batch_size: int,
    variant: str = "published",
) -> Float32[Array, " n"]:
    """Returns the norm of the loss's gradient by the last layer's weights and bias, mean over runs.

    Args:
      early_logits: Early in training, of several runs.
      early_squared_norms: |h|^2 of the last layer's input there.
      labels: Class ids in [0, c).
      batch_size: Size of the batches that the samples form in their order; for `deepcore` only.
      variant: |softmax - one-hot| sqrt(1 + |h|^2), of each sample's own loss; `deepcore` takes the
        mean loss of a batch, so that the gradient keeps a factor 1 / (size of the sample's batch):
        a short last batch is inflated, and the order of the samples matters.
    Source: Paul et al. 2021, arXiv 2107.07075.
    """
    norms = _error_norms(early_logits, labels)
    scores = (norms * jnp.sqrt(1 + early_squared_norms.astype(jnp.float32))).mean(axis=0)
    if variant == "published":
        return scores
    num = len(labels)
    starts = jnp.arange(num) // batch_size * batch_size
    return scores / jnp.minimum(batch_size, num - starts)


def _error_norms(logits: Float[Array, "r n c"], labels: Int[Array, " n"]) -> Float32[Array, "r n"]:
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    lacking = _lacking(probabilities, labels[None])
    others = _without(probabilities, labels[None])
    return jnp.sqrt(jnp.square(others).sum(axis=-1) + jnp.square(lacking))


def _lacking(probabilities: Float[Array, "*n c"], classes: Int[Array, "*#n"]) -> Float[Array, "*n"]:
    """Returns 1 - the probability of a class."""
    return _without(probabilities, classes).sum(axis=-1)


def _without(
    probabilities: Float[Array, "*n c"], classes: Int[Array, "*#n"]
) -> Float[Array, "*n c"]:
    """Returns the probabilities with 0 in place of a class."""
    is_it = jnp.arange(probabilities.shape[-1]) == classes[..., None]
    return jnp.where(is_it, 0, probabilities)


def perplexity(of: ResponseLosses) -> Float32[np.ndarray, " n"]:
    """Returns exp of the mean loss per token of the response, given its prompt; 1 or more.

    Source: Marion et al. 2023, When less is more.
    """
    return np.exp(of.losses)


def length(of: ResponseLosses) -> Float32[np.ndarray, " n"]:
    """Returns the number of tokens of the response, the end of the sequence included."""
    return of.num_tokens.astype(np.float32)


def ifd(of: ResponseLosses, variant: str = "published") -> Float32[np.ndarray, " n"]:
    """Returns instruction-following difficulty: how little the prompt helps; about 1 if not at all.

    Args:
      of: Losses with the prompt and of the response alone.
      variant: `published`, the ratio of the mean loss given the prompt to that of the bare
        response; `superfiltering`, of perplexities. `cherry`, as the code of Cherry LLM: the ratio
        to the loss behind `### Response:`, and 0 where that is above 1. The code drops such
        samples; a 0 ranks below all other scores, so that `hardest` keeps one only if there are too
        few others. `t_shirt`, as `superfiltering` of the half of all tokens whose losses the prompt
        changes most, one threshold for the whole set; as in T-SHIRT's code, 1 for a response that
        has none of them. 0 where `superfiltering` is 1 or more, which that code drops. Its average
        over copies with noise in their embeddings is not taken.
    Raises:
      ValueError: a response whose loss alone is not known, or is 0, so that there is no ratio;
        losses behind `### Response:`, or of tokens, that were not measured.
    Sources: Li et al. 2024, From quantity to quality (Cherry LLM), arXiv 2308.12032; Li et al.
      2024, Superfiltering, arXiv 2402.00530; Fu et al. 2025, T-SHIRT, arXiv 2506.01317.
    """
    if of.alone is None:
        raise expect.InputError(
            "ifd: compares responses with the same ones alone, which there are not where some have "
            "several turns; expected dataset.turns last or first."
        )
    alone = of.after_prefix if variant == "cherry" else of.alone
    if alone is None:
        raise expect.InputError(
            "ifd: variant 'cherry' needs after_prefix, as dlc.measure_responses(model, data) gives "
            "it; got None."
        )
    _check_alone(np.isfinite(alone), of, "of two tokens or more, since the first of all has none")
    if variant == "superfiltering":
        return np.exp(of.losses - alone)
    if variant == "t_shirt":
        return np.where(of.losses < alone, _of_changed_tokens(of), np.float32(0))
    _check_alone(alone > 0, of, "as they are with variant 'superfiltering'")
    ratio = of.losses / alone
    return np.where(ratio > 1, np.float32(0), ratio) if variant == "cherry" else ratio


def _check_alone(is_right: Bool[np.ndarray, " n"], of: ResponseLosses, expected: str) -> None:
    if not is_right.all():
        raise expect.InputError(
            f"ifd: {int((~is_right).sum())} responses have no loss without their prompt, such as "
            f"{of.ids[np.argmin(is_right)]}; expected responses {expected}."
        )


_SHARE_OF_TOKENS = 0.5  # that T-SHIRT's scores are of


def _of_changed_tokens(of: ResponseLosses) -> Float32[np.ndarray, " n"]:
    """Returns exp of the mean change of losses, over tokens that the prompt changes most."""
    if of.changes is None:
        raise expect.InputError(
            "ifd: variant 't_shirt' needs changes, as dlc.measure_responses(model, data) gives "
            "them; got None."
        )
    sizes = np.array([changes.size for changes in of.changes])
    _check_alone(sizes > 0, of, "whose tokens are the same behind a prompt and alone")
    changes = np.concatenate(of.changes)
    threshold = np.quantile(np.abs(changes), 1 - _SHARE_OF_TOKENS)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.abs(changes) > threshold
    sums = np.bincount(owners, changes * counts, minlength=len(sizes))
    return np.exp(sums / np.maximum(np.bincount(owners, counts), 1)).astype(np.float32)


_BOTH = ("published", "deepcore")
# What a score is computed from -> what gives it.
_GIVEN_BY = {
    "losses": "losses, as dlc.probe(encoder, dataset) gives them",
    "training": "a TrainingRecord, as dlc.record_training(encoder, dataset) gives it",
    "responses": "ResponseLosses, as dlc.measure_responses(model, data) gives them",
}


class Score(NamedTuple):
    """A scoring method.

    Attributes:
      compute: (what `of` says, variant) to scores [n].
      of: `losses`, a matrix [m, n], `training`, a `TrainingRecord`, or `responses`,
        `ResponseLosses` of instruction data.
      variants: Definitions that it knows; `published`, and `deepcore` where that library's differs.
    """

    compute: Callable[[Any, str], Any]
    of: str
    variants: tuple[str, ...] = ("published",)


def _grand(record: Any, variant: str) -> Any:
    arrays = (record.early_logits, record.early_squared_norms, record.labels)
    return grand(*arrays, batch_size=record.batch_size, variant=variant)


def _el2n(record: Any, variant: str) -> Any:
    logits = record.logits[None] if variant == "paper" else record.early_logits
    return el2n(logits, record.labels)


SCORES: dict[str, Score] = {
    "dlc": Score(lambda losses, _: dlc(losses), "losses"),
    "least_confidence": Score(
        lambda record, variant: least_confidence(record.logits, variant=variant), "training", _BOTH
    ),
    "entropy": Score(lambda record, _: entropy(record.logits), "training"),
    "margin": Score(lambda record, _: margin(record.logits), "training"),
    "forgetting": Score(
        lambda record, variant: forgetting(record.correct, variant=variant), "training", _BOTH
    ),
    "grand": Score(_grand, "training", _BOTH),
    "el2n": Score(_el2n, "training", ("published", "paper")),
    "perplexity": Score(lambda responses, _: perplexity(responses), "responses"),
    "ifd": Score(ifd, "responses", ("published", "superfiltering", "cherry", "t_shirt")),
    "length": Score(lambda responses, _: length(responses), "responses"),
}


def column_name(method: str, variant: str) -> str:
    """Returns what a score is called in a table: the variant is named unless it is published."""
    return method if variant == "published" else f"{method}_{variant}"


def score(
    of: ProbeLosses | TrainingRecord | ResponseLosses | np.ndarray,
    *,
    method: str = "dlc",
    variant: str = "published",
) -> Float32[np.ndarray, " n"]:
    """Returns how hard each sample is to learn; higher is harder.

    Args:
      of: What `probe` or `probe_responses` returned, or a bare matrix of losses [m, n] of your
        own, for `dlc`; what `measure_responses` returned for `perplexity`, `ifd` and `length`; what
        `record_training` returned for all others.
      method: `dlc`, the mean loss along the path; `least_confidence`, `entropy`, `margin`,
        `forgetting`, `grand`, `el2n`: see the functions in `dlc_jax.scores`;
        `perplexity`, `ifd`, `length`: see `dlc_jax.scores`.
      variant: `published`, or `deepcore` for what that library computes instead: by
        `least_confidence`, `forgetting` and `grand`; `paper` of `el2n`, as that baseline of Jiang
        et al. 2025 was run; `superfiltering`, `cherry` and `t_shirt` of `ifd`.
    Raises:
      ValueError: an unknown method or variant, something else than the method needs, or values
        that are not finite.
    Example:
      >>> losses = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]], np.float32)
      >>> dlc.score(losses).tolist()
      [1.0, 2.0, 3.0]
    """
    expect.one_of("score method", method, SCORES)
    chosen = SCORES[method]
    expect.one_of(f"variant of the score {method}", variant, chosen.variants)
    kinds = {TrainingRecord: "training", ResponseLosses: "responses"}
    if kinds.get(type(of), "losses") != chosen.of:
        got = f"an array {of.shape}" if isinstance(of, np.ndarray) else type(of).__name__
        needed = _GIVEN_BY[chosen.of]
        raise expect.InputError(f"score method {method!r}: needs {needed}; got {got}.")
    if isinstance(of, TrainingRecord):
        check_record(of)
    elif not isinstance(of, ResponseLosses):
        of = _losses(of)
    return np.array(chosen.compute(of, variant))


def _losses(of: ProbeLosses | np.ndarray) -> np.ndarray:
    losses = of.losses if isinstance(of, ProbeLosses) else np.asarray(of)
    if losses.ndim != 2 or 0 in losses.shape:
        raise expect.InputError(f"losses: expected a matrix [m, n], got shape {losses.shape}.")
    ids = of.ids if isinstance(of, ProbeLosses) else np.arange(losses.shape[1])
    expect.losses_are_finite(losses, ids)
    return losses
