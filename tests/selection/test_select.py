import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.selection.methods import budgets, fractions

FRACTION = st.floats(0.01, 0.99)


@pytest.fixture(scope="module")
def scored():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 500)
    return generator.normal(size=500).astype(np.float32), labels


@given(num=st.integers(1, 400), keep_fraction=FRACTION, split=FRACTION)
def test_budgets_are_exact_and_fit_their_pools(num, keep_fraction, split):
    pool, easy, hard = budgets(num, keep_fraction, split)
    assert easy + hard == round(num * keep_fraction)
    assert 0 <= easy <= pool
    assert 0 <= hard <= num - pool


def test_budgets_where_hard_taking_the_remainder_would_overdraw():
    assert budgets(50, 0.5, 0.75) == (38, 13, 12)
    assert fractions(0.3, 0.1) == (0.1, pytest.approx(0.2))
    assert fractions(0.3, 0.9) == (pytest.approx(0.2), pytest.approx(0.1))


def test_a_minimum_that_nothing_needs_changes_nothing(scored):
    scores, labels = scored
    plain = dlc.select(scores, labels, keep_fraction=0.3, split=0.4, seed=2)
    least = dlc.select(
        scores, labels, keep_fraction=0.3, split=0.4, seed=2, rules=dlc.Rules(min_per_class=5)
    )
    np.testing.assert_array_equal(plain.indices, least.indices)
    with pytest.raises(ValueError, match=r"min_per_class: mode 'official' has none"):
        dlc.select(
            scores,
            labels,
            keep_fraction=0.3,
            split=0.4,
            mode="official",
            rules=dlc.Rules(min_per_class=1),
        )
    with pytest.raises(ValueError, match="min_per_class"):
        dlc.select(scores, labels, keep_fraction=0.3, rules=dlc.Rules(min_per_class=-1))


def test_easiest_and_hardest_are_the_extremes(scored):
    scores, labels = scored
    for method, sign in (("easiest", 1), ("hardest", -1)):
        kept = dlc.select(scores, labels, method=method, keep_fraction=0.2).indices
        for label in range(6):
            members = np.flatnonzero(labels == label)
            order = members[np.argsort(sign * scores[members], kind="stable")]
            expected = set(order[: round(len(members) * 0.2)])
            assert set(kept) & set(members) == expected


def test_flexrand_draws_from_its_pools(scored):
    scores, labels = scored
    kept = dlc.select(scores, labels, keep_fraction=0.4, split=0.25, seed=1).indices
    for label in range(6):
        members = np.flatnonzero(labels == label)
        order = members[np.argsort(scores[members], kind="stable")]
        pool, easy, hard = budgets(len(members), 0.4, 0.25)
        assert len(set(kept) & set(order[:pool])) == easy
        assert len(set(kept) & set(order[pool:])) == hard


def test_flexrand_draws_every_sample_equally_often():
    scores, labels = np.arange(40, dtype=np.float32), np.zeros(40, int)
    counts = np.zeros(40)
    for seed in range(400):
        counts[dlc.select(scores, labels, keep_fraction=0.3, split=0.5, seed=seed).indices] += 1
    # 6 of 20 in each pool: 120 of 400 draws, standard deviation 9.2
    assert np.all(np.abs(counts - 120) < 4.5 * 9.2)


@pytest.mark.parametrize("method", ["flexrand", "random"])
def test_a_class_is_drawn_the_same_whatever_else_there_is(scored, method):
    scores, labels = scored
    kept = dlc.select(scores, labels, method=method, keep_fraction=0.3, seed=5).indices
    only = np.flatnonzero(labels <= 2)
    alone = dlc.select(scores[only], labels[only], method=method, keep_fraction=0.3, seed=5)
    assert set(only[alone.indices]) == set(kept) & set(only)
    other = dlc.select(scores, labels, method=method, keep_fraction=0.3, seed=6).indices
    assert set(other) != set(kept)


def test_random_does_not_look_at_scores(scored):
    scores, labels = scored
    kept = dlc.select(scores, labels, method="random", keep_fraction=0.3, seed=5)
    other = dlc.select(-scores, labels, method="random", keep_fraction=0.3, seed=5)
    np.testing.assert_array_equal(kept.indices, other.indices)


def test_class_ids_may_have_gaps_and_numbers_any_type():
    labels = np.array([0, 0, 2_000_000, 2_000_000], np.uint32)
    kept = dlc.select(np.arange(4), labels, method="hardest", keep_fraction=np.float64(0.5))
    assert kept.indices.tolist() == [1, 3]
    assert kept.num_kept_per_class[[0, 1, 2_000_000]].tolist() == [1, 0, 1]


def test_equal_scores_go_by_position():
    kept = dlc.select(np.zeros(10), np.zeros(10, int), method="easiest", keep_fraction=0.3)
    assert kept.indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep_fraction": 0}, "strictly between 0 and 1"),
        ({"keep_fraction": 1}, "strictly between 0 and 1"),
        ({"keep_fraction": 30}, r"Did you mean 0\.3"),
        ({"split": 0.0}, "split"),
        ({"split": 1.0}, "split"),
        ({"method": "flexrnd"}, "flexrand"),
        ({"method": "easiest", "split": 0.5}, "takes none"),
        ({"mode": "offical"}, "official"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32, "mode": "official"}, "seed"),
        ({"keep_fraction": float("nan")}, "strictly between 0 and 1"),
        ({"scores": np.array(["a", "b"])}, "expected numbers"),
        ({"labels": np.array([0, 10**9])}, r"np\.unique"),
        ({"mode": "official", "method": "easiest", "keep_fraction": 0.15}, r"0\.1, 0\.2"),
        ({"scores": np.array([0.0, np.nan])}, "position 1"),
        ({"scores": np.zeros(3)}, r"\(3,\) and \(2,\)"),
        ({"labels": np.array([0.0, 1.0])}, "integers"),
        ({"labels": np.array([0, -1])}, "non-negative"),
        ({"mode": "official", "keep_fraction": 0.15}, r"0\.1, 0\.2"),
        ({"mode": "official", "split": 0.52}, r"0\.05, 0\.10"),
    ],
)
def test_bad_input_is_refused(changes, says):
    arguments = {"scores": np.zeros(2), "labels": np.zeros(2, int), "keep_fraction": 0.5}
    arguments |= changes
    scores, labels = arguments.pop("scores"), arguments.pop("labels")
    with pytest.raises(ValueError, match=says):
        dlc.select(scores, labels, **arguments)
