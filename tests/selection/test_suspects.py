"""Suspect labels against a plain version, what is left out for them, and most similar samples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_samples import samples_of

import dlc_jax as dlc
from dlc_jax.selection import Candidates, most_similar


def probes_of(nearest, labels, losses=None):
    nearest, labels = np.asarray(nearest, np.int32), np.asarray(labels, np.int32)
    if losses is None:
        losses = np.random.default_rng(0).gamma(2, size=nearest.shape)
    num_probes, num_classes = len(nearest), int(max(labels.max(), nearest.max())) + 1
    return dlc.ProbeLosses(
        losses=np.asarray(losses, np.float32),
        sparsity=np.linspace(0, 0.9, num_probes, dtype=np.float32),
        labels=labels,
        ids=np.arange(len(labels)).astype(np.str_),
        prototypes=np.zeros((num_classes, 2), np.float32),
        class_names=tuple(map(str, range(num_classes))),
        nearest=nearest,
    )


def plain_version(probes):
    """Sample by sample and probe by probe; the binomial tail is summed term by term."""
    num = len(probes.labels)
    counts = [sum(probes.labels == label) for label in set(probes.labels.tolist())]
    chance = max(counts) / num
    told = []
    for row in probes.nearest:
        num_right = sum(row == probes.labels)
        tail = sum(
            math.comb(num, k) * chance**k * (1 - chance) ** (num - k)
            for k in range(num_right, num + 1)
        )
        told.append(tail < 0.01)
    suspects = {}
    for i, label in enumerate(probes.labels):
        seen = [int(row[i]) for row, counts in zip(probes.nearest, told, strict=True) if counts]
        if seen and label not in seen:
            losses = [row[i] for row, counts in zip(probes.losses, told, strict=True) if counts]
            suspects[i] = (max(seen, key=seen.count), np.mean(losses, dtype=np.float64))
    ranked = sorted(suspects, key=lambda i: (-np.float32(suspects[i][1]), i))
    return told, ranked, [suspects[i][0] for i in ranked]


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6))
def test_suspects_are_those_of_a_plain_version(seed, num_classes, num_probes):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, 40)
    knows = generator.random((num_probes, 1)) * generator.random(40) > 0.3
    nearest = np.where(knows, labels, generator.integers(0, num_classes, (num_probes, 40)))
    probes = probes_of(nearest, labels)
    found = dlc.suspect_labels(probes)
    told, ranked, suggested = plain_version(probes)
    assert found.is_informative.tolist() == told
    assert found.ranked.tolist() == ranked
    assert found.suggested[found.ranked].tolist() == suggested
    np.testing.assert_array_equal(found.num_right, (nearest == labels).sum(0))
    np.testing.assert_array_equal(found.share_right, (nearest == labels).mean(1))


def test_probes_at_chance_do_not_count():
    """A network that calls everything the largest class is right for a third, and knows nothing."""
    labels = np.repeat([0, 1, 2, 3], [20, 14, 13, 13])
    knows = labels.copy()
    knows[[5, 30]] = 3  # mislabelled
    nothing = np.zeros(60, int)
    found = dlc.suspect_labels(probes_of([knows, nothing], labels))
    assert found.is_informative.tolist() == [True, False]
    assert sorted(found.ranked.tolist()) == [5, 30]  # the first is right under the other probe
    assert found.num_right[[5, 30]].tolist() == [1, 0]
    assert found.suggested[[5, 30, 40]].tolist() == [3, 3, labels[40]]
    at_chance = dlc.suspect_labels(probes_of([nothing, nothing], labels))
    assert not at_chance.is_suspect.any()
    assert np.isnan(at_chance.scores).all()
    np.testing.assert_array_equal(at_chance.suggested, labels)


@pytest.mark.parametrize("labels", [np.zeros(30, int), [0, 1], [0]])
def test_one_class_or_two_samples_tell_nothing(labels):
    found = dlc.suspect_labels(probes_of([labels, labels], labels))
    assert not found.is_informative.any()
    assert found.ranked.tolist() == []


def test_losses_without_nearest_classes_are_refused():
    probes = probes_of([[0, 1]], [0, 1])
    object.__setattr__(probes, "nearest", None)
    with pytest.raises(dlc.InputError, match=r"probes: have no nearest.*got None"):
        dlc.suspect_labels(probes)


def candidates(labels, suspects=None):
    samples = samples_of(labels)
    return Candidates(
        samples["scores"], samples["labels"], features=samples["features"], suspects=suspects
    )


@pytest.mark.parametrize("method", ["random", "easiest", "flexrand", "herding"])
def test_suspects_are_left_out_and_as_many_are_kept(method):
    labels = np.arange(60) % 3
    suspects = np.zeros(60, bool)
    suspects[[0, 3, 6, 9, 1]] = True
    rules = dlc.Rules(leave_out_suspects=True)
    kept = candidates(labels, suspects).select(method=method, keep_fraction=0.5, rules=rules)
    assert not suspects[kept.indices].any()
    assert kept.num_kept_per_class.tolist() == [10, 10, 10]
    assert (kept.num_left_out, kept.num_short, kept.leave_out_suspects) == (5, 0, True)
    with_all = candidates(labels, suspects).select(method=method, keep_fraction=0.5)
    without = candidates(labels).select(method=method, keep_fraction=0.5)
    np.testing.assert_array_equal(with_all.indices, without.indices)


def test_a_class_of_suspects_is_lost_and_counted():
    labels = np.repeat([0, 1], 10)
    rules = dlc.Rules(leave_out_suspects=True, max_similarity=0.999)
    kept = candidates(labels, labels == 0).select(method="random", keep_fraction=0.5, rules=rules)
    assert kept.num_kept_per_class.tolist() == [0, 5]
    assert (kept.num_left_out, kept.num_short) == (10, 5)
    every = candidates(labels, labels < 2).select(method="random", keep_fraction=0.5, rules=rules)
    assert (len(every), every.num_short) == (0, 10)


def test_a_suspect_does_not_stand_for_its_near_duplicate():
    """Of two equal samples the suspect is left out, and the other one stays."""
    labels, features = np.zeros(6, int), np.eye(6, dtype=np.float32)
    features[1] = features[0]
    for suspect in (0, 1):
        them = Candidates(None, labels, features=features, suspects=np.arange(6) == suspect)
        kept = them.select(
            method="random",
            keep_fraction=0.99,
            rules=dlc.Rules(leave_out_suspects=True, max_similarity=0.9),
        )
        assert kept.indices.tolist() == [i for i in range(6) if i != suspect]


@pytest.mark.parametrize(
    ("suspects", "choice", "says"),
    [
        (None, {}, r"suspects: leave_out_suspects needs them; see dlc\.suspect_labels"),
        (
            np.zeros(3, bool),
            {},
            r"suspects: expected a truth value per label, 20 in all, got bool \(3,",
        ),
        (np.zeros(20, bool), {"mode": "official"}, "'official' leaves nothing out"),
        (np.zeros(20, bool), {"method": "auto"}, "is tuned on all samples"),
    ],
)
def test_suspects_that_cannot_be_left_out(suspects, choice, says):
    choice = {"method": "random", "keep_fraction": 0.5} | choice
    with pytest.raises(dlc.InputError, match=says):
        candidates(np.arange(20) % 2, suspects).select(
            **choice, rules=dlc.Rules(leave_out_suspects=True)
        )


@pytest.mark.parametrize("num", [2, 50, 1030])  # more than a block
def test_most_similar_is_that_of_all_cosines(num):
    features = np.random.default_rng(num).normal(size=(num, 6)).astype(np.float32)
    others, cosines = most_similar(features)
    units = features.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = units @ units.T - 3 * np.eye(num)
    np.testing.assert_array_equal(others, expected.argmax(axis=1))
    np.testing.assert_allclose(cosines, expected.max(axis=1), atol=1e-6)
