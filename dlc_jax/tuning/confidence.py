"""How sure linear heads are of the label of a sample that they were not trained on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from dlc_jax import expect
from dlc_jax.selection import id_keys
from dlc_jax.tuning.linear import LinearProbeConfig, linear_probes
from dlc_jax.tuning.tune import NUM_PARTS, parts


def self_confidence(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
    settings: LinearProbeConfig = LinearProbeConfig(),
) -> Float32[np.ndarray, " n"]:
    """Returns the probability of each sample's own label; low where the label is suspect.

    Five linear heads are trained, each on four fifths of every class, and give the probabilities of
    the other fifth. A class of which no other sample is there gets a probability near 0.

    Args:
      features: [n, d] features of a frozen encoder, as from `features`.
      labels: [n] class ids.
      ids: [n] sample ids, which then decide what is held out; as in `tune`.
      seed: Seed of the parts, of how heads start and of their data order.
      settings: How the heads are trained.
    Returns:
      In [0, 1]; sort ascending to see the most suspect first.
    Raises:
      ValueError: as `linear_probes`; fewer than five samples.
    Source: Northcutt et al. 2021, Confident learning, arXiv 1911.00068: self-confidence by
      out-of-sample probabilities.
    Example:
      >>> labels = np.repeat([0, 1], 25)
      >>> features = np.eye(2, dtype=np.float32)[labels]
      >>> labels[3] = 1  # a mistake
      >>> int(dlc.self_confidence(features, labels).argmin())
      3
    """
    probabilities = held_out_probabilities(features, labels, ids=ids, seed=seed, settings=settings)
    return probabilities[np.arange(len(probabilities)), np.asarray(labels)]


def held_out_probabilities(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
    settings: LinearProbeConfig = LinearProbeConfig(),
) -> Float32[np.ndarray, "n c"]:
    """Returns the probabilities of all classes; arguments and errors as for `self_confidence`."""
    from scipy.special import softmax  # which only this needs

    features, labels = np.asarray(features), np.asarray(labels)
    expect.features_fit_labels("features", features, labels)
    if len(labels) < NUM_PARTS:
        raise expect.InputError(
            f"labels: {len(labels)} samples are too few to hold a fifth out; expected "
            f"{NUM_PARTS} or more."
        )
    expect.seed(seed)
    part = parts(labels, None if ids is None else id_keys(np.asarray(ids, np.str_)), seed, 0)
    trained = linear_probes(
        features,
        labels,
        [np.flatnonzero(part != held_out) for held_out in range(NUM_PARTS)],
        val_features=features,
        val_labels=labels,
        seeds=[seed] * NUM_PARTS,
        settings=settings,
    )
    kernel, bias = trained.heads["kernel"], trained.heads["bias"]
    logits = np.empty((len(labels), bias.shape[1]), np.float64)
    for held_out in range(NUM_PARTS):
        own = part == held_out
        logits[own] = features[own].astype(np.float64) @ kernel[held_out] + bias[held_out]
    return softmax(logits, axis=1).astype(np.float32)
