"""Intervals of means over runs and samples: by hand, and whether they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from dlc_jax.tuning.gaps import crossed, holm, likeness_of, of_many, over_splits, two_sided
from dlc_jax.types import Gap


def test_runs_and_samples_are_counted_as_an_analysis_of_variance_does():
    """Mean squares of a two-way table; the expected ones solved for both variances."""
    values = np.random.default_rng(0).normal(size=(4, 30)) + np.linspace(0, 2, 30)
    values += np.array([[0.0], [1.0], [-1.0], [0.5]])
    of_runs = 30 * values.mean(axis=1).var(ddof=1)
    of_samples = 4 * values.mean(axis=0).var(ddof=1)
    left = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    residual = (left**2).sum() / (3 * 29)
    variance = (of_runs + of_samples - residual) / 120
    freedom = variance**2 / ((of_runs / 120) ** 2 / 3 + (of_samples / 120) ** 2 / 29)
    found = crossed(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    assert found.p_value == pytest.approx(stats.t.sf(values.mean() / np.sqrt(variance), freedom))


def test_one_run_speaks_of_samples_and_one_sample_of_runs():
    values = np.random.default_rng(1).normal(1, 1, 50)
    low, high = stats.t.interval(0.95, 49, values.mean(), stats.sem(values))
    for table in (values[None], values[:, None]):
        assert crossed(table).half_width == pytest.approx((high - low) / 2)
    assert crossed(np.full((3, 5), 2.0)) == Gap(2.0, 0.0, 1.0)
    assert crossed(np.ones((1, 1))) == Gap(1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("runs", "samples", "both"),
    [(0.0, 0.0, 0.5), (0.0, 0.3, 0.4), (0.03, 0.3, 0.4), (0.03, 0.0, 0.5), (0.1, 0.3, 0.4)],
)
@pytest.mark.parametrize("num_runs", [3, 10])
def test_95_of_100_intervals_hold_the_truth(runs, samples, both, num_runs):
    """Where those over runs alone hold it in as few as 60, since the samples are the same."""
    generator, held, num_sets = np.random.default_rng(0), 0, 500
    for _ in range(num_sets):
        values = generator.normal(0, runs, (num_runs, 1)) + generator.normal(0, samples, 200)
        found = crossed(values + generator.normal(0, both, (num_runs, 200)))
        held += abs(found.mean) <= found.half_width
    # with three runs whose differences are most of it, 92 of 100 do
    assert (0.9 if num_runs == 3 else 0.93) * num_sets <= held <= 0.99 * num_sets


def test_splits_whose_training_sets_overlap_have_a_wider_interval():
    values = np.random.default_rng(0).normal(1.0, 2.0, 10)
    low, high = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    found = over_splits(values, test_to_train=0.5)
    assert found.half_width == pytest.approx((high - low) / 2 * np.sqrt(1 + 10 * 0.5))
    assert over_splits(np.ones(4), 0.5) == Gap(1.0, 0.0, 1.0)


def test_holms_correction():
    """Checked against the steps of the procedure, written out."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    p_values = np.random.default_rng(0).random(20) ** 3
    corrected, is_rejected = np.array(holm(p_values.tolist())), np.zeros(20, bool)
    for rank, place in enumerate(np.argsort(p_values)):
        if p_values[place] > 0.05 / (20 - rank):
            break
        is_rejected[place] = True
    np.testing.assert_array_equal(corrected <= 0.05, is_rejected)


@pytest.mark.parametrize("mean", [-30.0, -0.5, 0.0, 0.5, 30.0])
def test_a_p_value_of_either_direction(mean):
    """Also of a mean so far below 0 that the p-value of being above it rounds to 1."""
    values = np.random.default_rng(0).normal(size=(3, 200))
    values += mean - values.mean()
    found = two_sided(values, crossed)
    assert found == pytest.approx(2 * crossed(np.sign(mean) * values if mean else values).p_value)
    assert found == two_sided(-values, crossed)
    assert (found < 1e-9) == (abs(mean) == 30)
    assert two_sided(np.ones((3, 5)), crossed) == 1.0


def test_many_comparisons_with_one_reference():
    """Against exact values: independent ones, equal ones, two that share half of their noise."""
    p_values = [0.001, 0.01, 0.2, 0.9, 1.0]
    exact = 1 - (1 - np.array(p_values)) ** 5
    np.testing.assert_allclose(of_many(p_values, np.eye(5)), exact, atol=0.01)
    np.testing.assert_allclose(of_many(p_values, np.ones((5, 5))), p_values, atol=0.01)
    half = np.array([[1.0, 0.5], [0.5, 1.0]])
    both_below = stats.multivariate_normal([0, 0], half).cdf(stats.norm.isf([0.05, 0.05]))
    np.testing.assert_allclose(of_many([0.05, 0.05], half), 1 - both_below, atol=0.008)
    # Dunnett's table: 20 comparisons of this kind at 5 % have the quantile 2.64
    many = np.full((20, 20), 0.5) + 0.5 * np.eye(20)
    assert of_many([stats.norm.sf(2.64)] * 20, many)[0] == pytest.approx(0.05, abs=0.008)


def test_correlations_of_differences():
    values = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_allclose(likeness_of(values), np.corrcoef(values), atol=1e-6)
    values[1] = 2.0
    expected = np.eye(3)
    expected[[0, 2], [2, 0]] = np.corrcoef(values[[0, 2]])[0, 1]
    np.testing.assert_allclose(likeness_of(values), expected, atol=1e-6)
