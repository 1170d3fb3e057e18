"""What was measured of every sample -> one hardness score per sample; higher is harder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from dlc_jax import checks
from dlc_jax.scores.checked import check_record
from dlc_jax.scores.dlc import dlc
from dlc_jax.scores.responses import ifd, length, perplexity
from dlc_jax.scores.training import el2n, entropy, forgetting, grand, least_confidence, margin
from dlc_jax.types import ProbeLosses, ResponseLosses, TrainingRecord

__all__ = ["SCORES", "Score", "column_name", "score"]

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
    "el2n": Score(lambda record, _: el2n(record.early_logits, record.labels), "training"),
    "perplexity": Score(lambda responses, _: perplexity(responses), "responses"),
    "ifd": Score(ifd, "responses", ("published", "superfiltering", "cherry")),
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
        `forgetting`, `grand`, `el2n`: see the functions in `dlc_jax.scores.training`;
        `perplexity`, `ifd`, `length`: see `dlc_jax.scores.responses`.
      variant: `published`, or `deepcore` for what that library computes instead: by
        `least_confidence`, `forgetting` and `grand`; `superfiltering` and `cherry` of `ifd`.
    Raises:
      ValueError: an unknown method or variant, something else than the method needs, or values
        that are not finite.
    Example:
      >>> losses = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]], np.float32)
      >>> dlc.score(losses).tolist()
      [1.0, 2.0, 3.0]
    """
    checks.one_of("score method", method, SCORES)
    chosen = SCORES[method]
    checks.one_of(f"variant of the score {method}", variant, chosen.variants)
    kinds = {TrainingRecord: "training", ResponseLosses: "responses"}
    if kinds.get(type(of), "losses") != chosen.of:
        got = f"an array {of.shape}" if isinstance(of, np.ndarray) else type(of).__name__
        needed = _GIVEN_BY[chosen.of]
        raise checks.InputError(f"score method {method!r}: needs {needed}; got {got}.")
    if isinstance(of, TrainingRecord):
        check_record(of)
    elif not isinstance(of, ResponseLosses):
        of = _losses(of)
    return np.array(chosen.compute(of, variant))


def _losses(of: ProbeLosses | np.ndarray) -> np.ndarray:
    losses = of.losses if isinstance(of, ProbeLosses) else np.asarray(of)
    if losses.ndim != 2 or 0 in losses.shape:
        raise checks.InputError(f"losses: expected a matrix [m, n], got shape {losses.shape}.")
    ids = of.ids if isinstance(of, ProbeLosses) else np.arange(losses.shape[1])
    checks.losses_are_finite(losses, ids)
    return losses
