"""Hardness from what a classifier trained on the whole data set showed of every sample.

Where a probability near 1 counts by what it lacks, that is summed over the other classes: a
difference from 1 would round most easy samples to the same 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


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
