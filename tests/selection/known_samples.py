"""Samples of which everything is known that a selector may go by, and all the selectors."""

import numpy as np

from dlc_jax.selection import INPUTS, SELECTORS, Candidates

VARIANTS = [(name, variant) for name, method in SELECTORS.items() for variant in method.variants]
# the others are decided by the samples alone
DRAWN = [(name, "published") for name in ("flexrand", "random", "ccs")]
DRAWN += [(name, "paper") for name in ("k_center_greedy", "contextual_diversity")]


BY_CLASS = ("prototypes", "ram_apl")  # compare classes also where all samples are one group


def samples_of(labels, seed=0, num_features=5, num_outputs=7):
    """Returns the arguments of `select` that describe samples with these labels; without ties."""
    generator = np.random.default_rng(seed)
    labels = np.asarray(labels)
    logits = 2 * generator.normal(size=(len(labels), num_outputs))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    features = generator.normal(size=(len(labels), num_features)) + labels[:, None]
    return {
        "scores": generator.gamma(2.0, size=len(labels)),
        "labels": labels,
        "features": features.astype(np.float32),
        "second_features": (features @ generator.normal(size=2 * (num_features,))).astype(
            np.float32
        ),
        "probabilities": probabilities.astype(np.float32),
        "similarities": np.tanh(generator.normal(size=(len(labels), 4))).astype(np.float32),
    }


def select(scores, labels, *, ids=None, **choice):
    """Selects as `dlc.select` does, by all inputs there are."""
    given = {name: choice.pop(name, None) for name in INPUTS}
    rows = {name: array for name, array in given.items() if array is not None}
    return Candidates(scores, labels, ids=ids, inputs=rows).select(**choice)
