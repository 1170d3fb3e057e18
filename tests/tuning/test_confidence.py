"""Probabilities of held-out samples, against heads that are trained fifth by fifth."""

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.tuning import held_out_probabilities

SETTINGS = dlc.LinearProbeConfig(epochs=5, batch_size=16, learning_rate=0.05)


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 100)
    centres = 3 * generator.normal(size=(3, 6))
    features = generator.normal(size=(100, 6)) + centres[labels]
    return features.astype(np.float32), labels


def fifths(labels):
    """Returns the fifth of each sample, from what `tune` holds out: it trains on the others."""
    from dlc_jax.tuning.tune import parts

    found = parts(labels, None, 3, 0)
    for label in np.unique(labels):
        sizes = np.bincount(found[labels == label], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    return found


def test_probabilities_are_of_heads_that_have_not_seen_the_sample(data):
    features, labels = data
    found = held_out_probabilities(features, labels, seed=3, settings=SETTINGS)
    part = fifths(labels)
    for number in range(5):
        own = np.flatnonzero(part == number)
        heads = dlc.linear_probes(
            features,
            labels,
            [np.flatnonzero(part != number)],
            val_features=features[own],
            val_labels=labels[own],
            seeds=[3],
            settings=SETTINGS,
        )
        logits = features[own] @ heads.heads["kernel"][0] + heads.heads["bias"][0]
        odds = np.exp(logits.astype(np.float64))
        expected = odds / odds.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found[own], expected, atol=1e-5)
        np.testing.assert_array_equal(found[own].argmax(1) == labels[own], heads.correct[0])
    confidence = dlc.self_confidence(features, labels, seed=3, settings=SETTINGS)
    np.testing.assert_array_equal(confidence, found[np.arange(100), labels])


def test_wrong_labels_have_the_least_confidence_in_any_order(data):
    features, labels = data
    wrong = [5, 50, 77]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    ids = np.array([f"s{i}" for i in range(100)])
    confidence = dlc.self_confidence(features, labels, ids=ids, settings=SETTINGS)
    assert set(wrong) <= set(np.argsort(confidence)[:6].tolist())
    order = np.random.default_rng(1).permutation(100)
    shuffled = dlc.self_confidence(
        features[order], labels[order], ids=ids[order], settings=SETTINGS
    )
    assert set(wrong) <= set(order[np.argsort(shuffled)[:6]].tolist())


def test_a_class_of_one_sample_is_never_expected(data):
    features, labels = data
    labels = labels.copy()
    labels[0] = 3
    assert dlc.self_confidence(features, labels, settings=SETTINGS)[0] < 0.2


def test_one_class_is_certain_and_four_samples_are_too_few(data):
    features, _ = data
    found = dlc.self_confidence(features[:10], np.zeros(10, int), settings=SETTINGS)
    np.testing.assert_array_equal(found, np.ones(10, np.float32))
    with pytest.raises(dlc.InputError, match="4 samples are too few to hold a fifth out"):
        dlc.self_confidence(features[:4], np.arange(4) % 2)
    with pytest.raises(dlc.InputError, match="features"):
        dlc.self_confidence(features[:7], np.arange(6) % 2)
