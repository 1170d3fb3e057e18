"""Selections by features and probabilities against plain NumPy, and what they are for."""

import numpy as np
import pytest
from conftest import subset
from hypothesis import given
from hypothesis import strategies as st
from known_samples import samples_of, select

import dlc_jax as dlc
from dlc_jax.selection.geometry import padded_length


def plain_herding(features, num, farthest):
    mean, chosen = features.mean(axis=0), []
    for _ in range(num):
        free = [i for i in range(len(features)) if i not in chosen]
        error = [np.linalg.norm(features[[*chosen, i]].mean(axis=0) - mean) for i in free]
        chosen.append(free[np.argmax(error) if farthest else np.argmin(error)])
    return chosen


def plain_farthest_first(distance, from_mean, num):
    chosen = [int(np.argmin(from_mean))]
    while len(chosen) < num:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -np.inf
        chosen.append(int(np.argmax(nearest)))
    return chosen


def plain_k_center(features, num):
    distance = np.linalg.norm(features[:, None] - features[None], axis=2)
    return plain_farthest_first(
        distance, np.linalg.norm(features - features.mean(axis=0), axis=1), num
    )


def plain_divergence(p, q):
    p, q = np.maximum(p, 1.2e-38), np.maximum(q, 1.2e-38)
    return (p * np.log(p / q)).sum(axis=-1) / 2 + (q * np.log(q / p)).sum(axis=-1) / 2


def plain_contextual_diversity(p, num):
    mean = p.mean(axis=0)
    return plain_farthest_first(
        plain_divergence(p[:, None], p[None]), plain_divergence(p, mean), num
    )


def plain_moderate(features, num):
    distance = np.linalg.norm(features - features.mean(axis=0), axis=1)
    return np.argsort(np.abs(distance - np.median(distance)), kind="stable")[:num]


def test_traversals_of_the_paper_start_at_a_draw():
    samples = samples_of(np.zeros(80, int), num_features=6)
    for method, distance in (
        (
            "k_center_greedy",
            np.linalg.norm(samples["features"][:, None] - samples["features"], axis=2),
        ),
        (
            "contextual_diversity",
            plain_divergence(
                *(samples["probabilities"].astype(float)[x] for x in (np.s_[:, None], np.s_[None]))
            ),
        ),
    ):
        starts = []
        for seed in range(30):
            first, rest = (
                select(
                    **samples,
                    method=method,
                    keep_fraction=num / 80,
                    seed=seed,
                    rules=dlc.Rules("paper"),
                ).indices
                for num in (1, 20)
            )
            starts += first.tolist()
            from_start = np.where(np.arange(80) == first[0], -1.0, 0.0)
            np.testing.assert_array_equal(
                rest, np.sort(plain_farthest_first(distance, from_start, 20))
            )
        assert (
            len(set(starts)) > 15
        )  # 25 of 30 draws of 80 differ on average, and 20 in all but 1 in 100


PLAIN = {
    ("herding", "paper"): lambda x, num: plain_herding(x, num, farthest=True),
    ("herding", "published"): lambda x, num: plain_herding(x, num, farthest=False),
    ("herding", "deepcore"): lambda x, num: plain_herding(x, num, farthest=True),
    ("k_center_greedy", "published"): plain_k_center,
    ("moderate", "published"): plain_moderate,
    ("contextual_diversity", "published"): plain_contextual_diversity,
}


@pytest.fixture(scope="module")
def real(sample, sample_encoder):
    """Ten images of each class: the encoder's features, and a softmax over prototypes."""
    few = np.concatenate([np.flatnonzero(sample.labels == j)[:10] for j in range(15)])
    some = subset(sample, few)
    features = dlc.features(sample_encoder, some, image_size=64)
    prototypes = np.stack([features[some.labels == j].mean(axis=0) for j in range(15)])
    logits = -np.linalg.norm(features[:, None] - prototypes[None], axis=2)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return {"labels": some.labels, "features": features, "probabilities": probabilities}


@pytest.mark.parametrize(("method", "variant"), PLAIN)
@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("data", ["random", "real"])
def test_identical_to_plain_numpy(request, method, variant, per_class, data):
    if data == "real":
        samples = request.getfixturevalue("real")
    else:
        samples = samples_of(np.random.default_rng(2).integers(0, 3, 130), num_features=24)
    labels = samples["labels"]
    rows = samples["probabilities" if method == "contextual_diversity" else "features"]
    groups = [np.flatnonzero(labels == j) for j in np.unique(labels)]
    for keep_fraction in (0.1, 0.4, 0.8):
        expected = [
            group[
                PLAIN[method, variant](
                    rows[group].astype(np.float64), round(len(group) * keep_fraction)
                )
            ]
            for group in (groups if per_class else [np.arange(len(labels))])
        ]
        kept = dlc.select(
            None,
            labels,
            method=method,
            keep_fraction=keep_fraction,
            features=samples["features"],
            probabilities=samples["probabilities"],
            rules=dlc.Rules(variant, per_class=per_class),
        )
        np.testing.assert_array_equal(kept.indices, np.sort(np.concatenate(expected)))


def test_herding_keeps_the_mean_and_the_slip_loses_it():
    features = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)

    def error(method, variant="published", seed=0):
        kept = dlc.select(
            None,
            np.zeros(500, int),
            method=method,
            keep_fraction=0.1,
            seed=seed,
            features=features,
            rules=dlc.Rules(variant, per_class=False),
        )
        assert len(kept) == 50
        return np.linalg.norm(features[kept.indices].mean(axis=0) - features.mean(axis=0))

    at_random = [error("random", seed=seed) for seed in range(20)]
    assert 5 * error("herding") < min(at_random)
    assert error("herding", "deepcore") > max(at_random)


def one_group(rows, method, keep_fraction, variant="published"):
    needs = "probabilities" if method == "contextual_diversity" else "features"
    return dlc.select(
        None,
        np.zeros(len(rows), int),
        method=method,
        keep_fraction=keep_fraction,
        rules=dlc.Rules(variant),
        **{needs: rows},
    ).indices


@pytest.mark.parametrize("size", [3, 512, 2048])
@pytest.mark.parametrize("method", ["k_center_greedy", "contextual_diversity"])
def test_copies_come_last_and_by_position(method, size):
    generator = np.random.default_rng(3)
    distinct = generator.normal(5.0, 1.0, size=(20, size))
    if method == "contextual_diversity":
        distinct = np.abs(distinct) / np.abs(distinct).sum(axis=1, keepdims=True)
    which = np.concatenate([generator.permutation(20), generator.integers(0, 20, 77)])
    rows = distinct[which].astype(np.float32)
    # not before every distinct row is in, and then from the first position on
    np.testing.assert_array_equal(one_group(rows, method, 20 / 97), np.arange(20))
    np.testing.assert_array_equal(one_group(rows, method, 60 / 97), np.arange(60))


def test_far_from_the_origin_centring_saves_the_distances():
    features = np.random.default_rng(4).normal(size=(80, 6))
    near = one_group(features, "k_center_greedy", 0.3)
    np.testing.assert_array_equal(one_group(features + 1e6, "k_center_greedy", 0.3), near)
    np.testing.assert_array_equal(near, np.sort(plain_k_center(features, 24)))


@pytest.mark.parametrize("outlier", [None, 1e6, 1e12])
def test_tight_clusters_are_no_copies(outlier):
    """A thousand times closer to each other than clusters are, or than the rest to one outlier."""
    generator = np.random.default_rng(6)
    centres = generator.normal(size=(20, 16))
    features = centres[np.arange(500) % 20] + 1e-3 * generator.normal(size=(500, 16))
    if outlier is not None:
        features[123] = outlier
    features = features.astype(np.float32).astype(np.float64)
    for num in (20, 100, 250):
        np.testing.assert_array_equal(
            one_group(features, "k_center_greedy", num / 500),
            np.sort(plain_k_center(features, num)),
        )
    logits = 3 * centres[np.arange(500) % 20] + 1e-3 * generator.normal(size=(500, 16))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = probabilities.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(
        one_group(probabilities, "contextual_diversity", 0.2),
        np.sort(plain_contextual_diversity(probabilities, 100)),
    )


@pytest.mark.parametrize("method", ["herding", "k_center_greedy", "moderate"])
@pytest.mark.parametrize("scale", [1e-170, 1e-25, 1e25, 1e160])
def test_the_scale_of_features_does_not_matter(method, scale):
    features = np.random.default_rng(5).normal(size=(60, 4))
    np.testing.assert_array_equal(
        one_group(features * scale, method, 0.4), one_group(features, method, 0.4)
    )


def test_probabilities_of_zero_are_defined():
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [1, 0, 0]], np.float32)
    for num in range(1, 5):
        expected = np.sort(plain_contextual_diversity(rows.astype(np.float64), num))
        np.testing.assert_array_equal(one_group(rows, "contextual_diversity", num / 5), expected)


def test_moderate_takes_equal_distances_by_position():
    features = np.array([[-2.0], [-1.0], [1.0], [2.0]])  # median distance 1.5: all tie
    np.testing.assert_array_equal(one_group(features, "moderate", 0.5), [0, 1])


@given(num=st.integers(1, 10**7))
def test_padding_is_moderate_and_lengths_are_few(num):
    length = padded_length(num)
    assert num <= length < num + max(num / 4, 16)
    assert padded_length(length) == length
