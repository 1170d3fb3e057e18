"""Targets in turn, and near-duplicates that are left out, against plain versions of both."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_samples import samples_of, select

import dlc_jax as dlc
from dlc_jax.selection import SELECTORS, Candidates
from dlc_jax.selection.similarity import near_duplicates


def torch_cosines(a, b):
    import torch

    a, b = (torch.asarray(rows, dtype=torch.float64) for rows in (a, b))
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).numpy()


@pytest.mark.parametrize("num", [1, 7, 1030])  # more than a block
def test_similarities_are_the_cosines_of_torch(num):
    generator = np.random.default_rng(num)
    features = (generator.normal(size=(num, 6)) * 1e4).astype(np.float32)
    targets = (generator.normal(size=(3, 6)) * 1e-4).astype(np.float32)
    found = dlc.similarities(features, targets)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_cosines(features, targets), atol=1e-6)
    assert dlc.similarities(features, features).max() <= 1
    huge = features.astype(np.float64) * 1e200
    np.testing.assert_allclose(dlc.similarities(huge, targets), found, atol=1e-6)


@pytest.mark.parametrize(
    ("features", "targets", "says"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "targets: have 4 features, expected 3"),
        (np.ones((2, 3)) * [[1], [0]], np.ones((1, 3)), "features: the row at position 1 is 0"),
        (np.ones((2, 3)), np.zeros((1, 3)), "targets: the row at position 0 is 0"),
        (np.ones((2, 3)), np.full((1, 3), np.nan), "targets: 1 rows are not finite"),
        (np.ones((2, 3)), np.zeros((0, 3)), r"targets: expected \[n, d\], got shape \(0, 3\)"),
    ],
)
def test_rows_without_a_cosine_are_refused(features, targets, says):
    with pytest.raises(dlc.InputError, match=says):
        dlc.similarities(features, targets)


def round_robin(rows, budget):
    """Takes the best of each target's list in turn, as the code of RDS+ does."""
    lists = [sorted(range(len(rows)), key=lambda i: (-rows[i, t], i)) for t in range(rows.shape[1])]
    taken = []
    while len(taken) < budget:
        for own in lists:
            sample = own.pop(0)
            if sample not in taken and len(taken) < budget:
                taken.append(sample)
    return sorted(taken)


@given(st.integers(0, 2**32), st.integers(1, 5), st.booleans())
def test_rds_takes_turns(seed, num_targets, is_tied):
    generator = np.random.default_rng(seed)
    rows = generator.uniform(-1, 1, (40, num_targets)).astype(np.float32)
    if is_tied:
        rows = rows.round(1)
    labels = np.arange(40) % 2
    kept = Candidates(None, labels, inputs={"similarities": rows}).select(
        method="rds", keep_fraction=0.35
    )
    for label in range(2):
        positions = np.flatnonzero(labels == label)
        expected = positions[round_robin(rows[positions], 7)]
        np.testing.assert_array_equal(kept.indices[labels[kept.indices] == label], expected)


def sem_de_dup(features, limit):
    """Returns the samples that are left: from the outside in, by the largest cosine so far."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort((units @ units.mean(axis=0)).round(6), kind="stable")
    cosines = np.triu(units[order] @ units[order].T, k=1)
    return np.sort(order[cosines.max(axis=0) <= limit])


@pytest.mark.parametrize("num", [1, 30, 1500])
@pytest.mark.parametrize("limit", [0.5, 0.9, 0.999])
def test_near_duplicates_are_those_of_semdedup(num, limit):
    generator = np.random.default_rng(num)
    centres = generator.normal(size=(num // 3 + 1, 8))
    features = centres[generator.integers(0, len(centres), num)]
    features += generator.gamma(0.3, 0.3, (num, 1)) * generator.normal(size=(num, 8))
    positions = generator.permutation(num)
    left_out = near_duplicates(features, positions, limit)
    expected = positions[sem_de_dup(features[positions], limit)]
    np.testing.assert_array_equal(np.sort(positions[~left_out]), np.sort(expected))
    assert num < 30 or 0 < left_out.sum() < num


@given(
    st.integers(0, 2**32),
    st.sampled_from(sorted(SELECTORS)),
    st.floats(0.05, 0.95),
    st.booleans(),
    st.sampled_from(["proportional", "nucs"]),
)
def test_what_is_kept_has_no_near_duplicate_and_is_as_much(
    seed, method, keep_fraction, with_ids, allocation
):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, 60)
    samples = samples_of(labels, seed)
    samples["features"] = samples["features"][generator.integers(0, 40, 60)]
    if with_ids:
        samples["ids"] = np.array([f"s{i}" for i in generator.permutation(60)])
    choice = {"method": method, "keep_fraction": keep_fraction}
    rules = dlc.Rules(max_similarity=0.9999, allocation=allocation)
    kept = select(**samples, **choice, rules=rules)
    assert kept.max_similarity == 0.9999
    without = select(**samples, **choice, rules=dlc.Rules(allocation=allocation))
    for label in np.unique(labels):
        own = kept.indices[labels[kept.indices] == label]
        rows = samples["features"][own].astype(np.float64)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.triu(units @ units.T, k=1).max(initial=0) < 1 - 1e-5
        num_different = len(np.unique(samples["features"][labels == label], axis=0))
        assert len(own) == min(num_different, without.num_kept_per_class[label])


def test_what_is_left_out_and_what_is_missing_is_counted():
    """A class of copies keeps one of the five that were asked for, whatever the least."""
    labels = np.repeat([0, 1], 10)
    features = np.random.default_rng(0).normal(size=(20, 3))
    features[:9] = features[0]
    for least in (0, 5):
        rules = dlc.Rules(max_similarity=0.9999, min_per_class=least)
        kept = dlc.select(
            None, labels, method="random", keep_fraction=0.5, features=features, rules=rules
        )
        assert kept.num_kept_per_class.tolist() == [2, 5]
        assert (kept.num_left_out, kept.num_short) == (8, 3)
    all_there = dlc.select(None, labels, method="random", keep_fraction=0.5)
    assert (all_there.num_left_out, all_there.num_short) == (0, 0)


def test_a_row_without_direction_is_named_by_its_position():
    samples = samples_of(np.repeat([0, 1], 10))
    samples["features"][15] = 0
    samples["ids"] = np.array([f"s{i}" for i in np.random.default_rng(0).permutation(20)])
    with pytest.raises(dlc.InputError, match="features: the row at position 15 is 0"):
        select(**samples, method="random", keep_fraction=0.5, rules=dlc.Rules(max_similarity=0.9))


def test_no_near_duplicate_changes_nothing():
    samples = samples_of(np.arange(50) % 2)
    for method in SELECTORS:
        kept, filtered = (
            select(**samples, method=method, keep_fraction=0.3, rules=rules)
            for rules in (dlc.Rules(), dlc.Rules(max_similarity=0.999999))
        )
        np.testing.assert_array_equal(kept.indices, filtered.indices)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"rules": dlc.Rules(max_similarity=1.0)}, "max_similarity: the cosine .* 0 and 1, got 1"),
        ({"rules": dlc.Rules(max_similarity=1 - 1e-9)}, "is 1 in single precision"),
        ({"rules": dlc.Rules(max_similarity=0.9), "mode": "official"}, "'official' leaves nothing"),
        ({"rules": dlc.Rules(max_similarity=0.9), "features": None}, "features: max_similarity"),
        ({"method": "auto", "rules": dlc.Rules(max_similarity=0.9)}, "is tuned on all samples"),
        ({"method": "rds", "similarities": None}, r"similarities: .*'rds'.*dlc.similarities"),
        ({"method": "longest", "scores": None}, r"'length' of dlc.measure_responses"),
    ],
)
def test_what_does_not_go_together_is_refused(choice, says):
    arguments = samples_of([0, 0, 1, 1]) | {"keep_fraction": 0.5, "method": "random"} | choice
    with pytest.raises(dlc.InputError, match=says):
        select(**arguments)
