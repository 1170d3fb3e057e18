import itertools

import numpy as np
import pytest
from conftest import require_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import dlc_jax as dlc
from dlc_jax.masking import refinements
from dlc_jax.probes.certificate import compare
from dlc_jax.types import ProbeLosses


def midpoints(num_probes, num_steps=50):
    return (2 * np.arange(num_probes) + 1) * num_steps // (2 * num_probes)


def curves(exponent, num=600, num_steps=50, seed=0):
    """Losses along a path: fractional Brownian motion, faster and faster."""
    generator = np.random.default_rng(seed)
    times = np.linspace(0, 1, num_steps + 1)[1:] ** 1.5
    power = 2 * exponent
    covariance = times[:, None] ** power + times**power - np.abs(times[:, None] - times) ** power
    moves = np.linalg.cholesky(covariance + 1e-12 * np.eye(num_steps)) @ generator.normal(
        size=(num_steps, num)
    )
    return moves + 2 * generator.normal(size=num), generator.integers(0, 4, num)


def certified(losses, labels, steps, num_steps, seed=0):
    """The certificate of losses of these steps of a path."""
    probes = ProbeLosses(
        losses.astype(np.float32),
        np.zeros(len(losses), np.float32),
        labels.astype(np.int32),
        np.arange(len(labels)).astype(np.str_),
        np.zeros((1, 0), np.float32),
        ("all",),
        steps=steps,
        num_steps=num_steps,
    )
    return dlc.certify(probes, seed=seed)


def held(losses, labels, num_probes, seed):
    """Which of the certificate's intervals hold what all probes say."""
    steps = midpoints(num_probes, len(losses))
    found = certified(losses[steps], labels, steps, len(losses), seed=seed)
    truth = compare(losses[steps].mean(axis=0), losses.mean(axis=0), labels)
    pairs = [(found.spearman, truth.spearman)]
    for method in ("easiest", "hardest"):
        pairs += [
            (some, getattr(truth, method)[share]) for share, some in getattr(found, method).items()
        ]
    return [low - 1e-9 <= value <= high + 1e-9 for (_, low, high), value in pairs]


@pytest.mark.parametrize(
    "exponent",
    [
        pytest.param(0.5, marks=pytest.mark.long),
        pytest.param(0.7, marks=pytest.mark.slow),
        pytest.param(0.9, marks=pytest.mark.long),
    ],
)
def test_intervals_hold_the_truth_on_curves_of_the_kind_that_is_assumed(exponent):
    found = [
        held(*curves(exponent, num=400, seed=seed), num_probes, seed)
        for seed in range(20)
        for num_probes in (3, 5, 10)
    ]
    assert np.mean(found) >= 0.95
    assert np.mean(found, axis=0).min() >= 0.9


@pytest.mark.long
def test_intervals_hold_the_truth_on_recorded_losses():
    folder = require_shared("golden")
    with np.load(folder / "resnet18-caltech15_outputs.npz") as file:
        losses = file["losses"]
    with np.load(folder / "resnet18-caltech15_inputs.npz") as file:
        labels = file["labels"]
    for num_probes in (3, 5, 8, 15):
        found = []
        for seed in range(20):
            part = np.random.default_rng(seed).random(len(labels)) < 0.5
            found.append(held(losses[:, part], labels[part], num_probes, seed))
        assert np.mean(found) >= 0.95
        assert np.mean(found, axis=0)[0] >= 0.9  # Spearman


def test_intervals_are_of_use():
    losses, labels = curves(0.7)
    steps = midpoints(5)
    found = certified(losses[steps], labels, steps, 50)
    wild = losses.copy()
    wild[steps] += np.random.default_rng(1).normal(size=(5, 600))  # each probe says something else
    other = certified(wild[steps], labels, steps, 50)
    assert found.spearman.high - found.spearman.low < 0.05
    assert other.spearman.estimate < found.spearman.low
    more = midpoints(15)
    better = certified(losses[more], labels, more, 50)
    assert better.spearman.low > found.spearman.low
    assert better.easiest[0.3].estimate > found.easiest[0.3].estimate


def test_a_whole_path_is_compared_with_a_finer_one():
    losses, labels = curves(0.7)
    found = certified(losses, labels, np.arange(50), 50)
    assert (found.num_probes, found.num_compared) == (50, 197)
    assert 0.99 < found.spearman.low <= found.spearman.high < 1


def test_comparison_is_of_ranks_within_classes():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=200), np.repeat([0, 1], [120, 80]).astype(np.int32)
    shifted = scores + 10 * labels  # classes do not compare
    same = compare(scores, shifted, labels)
    assert same.spearman == 1
    assert set(same.easiest.values()) == {1.0}
    noisy = scores + generator.normal(size=200)
    found = compare(scores, noisy, np.zeros(200, np.int32), [0.3])
    assert found.spearman == pytest.approx(spearmanr(scores, noisy).statistic, abs=1e-12)
    kept, others = set(np.argsort(scores)[:60]), set(np.argsort(noisy)[:60])
    assert found.easiest[0.3] == pytest.approx(len(kept & others) / 60)
    kept, others = set(np.argsort(scores)[-60:]), set(np.argsort(noisy)[-60:])
    assert found.hardest[0.3] == pytest.approx(len(kept & others) / 60)


@pytest.mark.parametrize(
    "losses",
    [np.ones((3, 8)), np.tile(np.arange(8.0), (3, 1)), np.random.default_rng(0).random((3, 8))],
)
@pytest.mark.parametrize("labels", [np.zeros(8), np.arange(8)])
def test_odd_losses_have_a_certificate(losses, labels):
    found = certified(losses, labels.astype(np.int32), np.array([1, 4, 7]), 9)
    for interval in (found.spearman, *found.easiest.values(), *found.hardest.values()):
        assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
    if np.ptp(losses, axis=0).max() == 0:  # nothing moves along the path
        assert found.spearman == (1, 1, 1)


def test_of_many_samples_some_are_looked_at():
    losses, labels = curves(0.7, num=600)
    many = np.tile(losses, 100) + 1e-3 * np.random.default_rng(0).normal(size=60_000)
    steps = midpoints(5)
    few = certified(losses[steps], labels, steps, 50)
    found = certified(many[steps], np.tile(labels, 100), steps, 50)
    assert found.spearman.estimate == pytest.approx(few.spearman.estimate, abs=0.005)
    assert certified(many[steps], np.tile(labels, 100), steps, 50) == found


@pytest.mark.slow
def test_what_cannot_be_certified_is_refused(sample_encoder, small_sample):
    probes = dlc.probe(sample_encoder, small_sample, image_size=32, num_probes=1)
    with pytest.raises(ValueError, match="two probes or more"):
        dlc.certify(probes)
    probes = dlc.probe(sample_encoder, small_sample, image_size=32, num_probes=2)
    for wrong in ({"keep_fractions": [1.0]}, {"level": 1.0}, {"num_draws": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dlc.certify(probes, **wrong)
    import dataclasses

    with pytest.raises(ValueError, match="steps and num_steps"):
        dlc.certify(dataclasses.replace(probes, steps=None))


@given(num_steps=st.integers(1, 300))
@settings(deadline=None)
def test_refinements_are_nested_and_end_with_all(num_steps):
    found = list(refinements(num_steps))
    np.testing.assert_array_equal(found[-1], np.arange(num_steps))
    for few, more in itertools.pairwise(found):
        assert set(few) < set(more)
    assert [len(steps) for steps in found[:-1]] == [5 * 3**k for k in range(len(found) - 1)]


@pytest.mark.slow
def test_auto_measures_no_probe_twice_and_what_fixed_numbers_measure(
    sample_encoder, small_sample, monkeypatch
):
    from dlc_jax.probes import images

    sizes = []
    plain = images.measure_losses

    def counted(*args, num_probes, **kwargs):
        sizes.append(num_probes)
        return plain(*args, num_probes=num_probes, **kwargs)

    monkeypatch.setattr(images, "measure_losses", counted)
    options = {"image_size": 32, "step": 0.05}
    all_of_them = dlc.probe(sample_encoder, small_sample, num_probes=20, **options)
    sizes.clear()
    few = dlc.probe(
        sample_encoder, small_sample, num_probes="auto", **options, path=dlc.PathSpec(agreement=0.1)
    )
    assert sizes == [5]
    np.testing.assert_array_equal(few.steps, midpoints(5, 20))
    np.testing.assert_array_equal(few.losses, all_of_them.losses[few.steps])
    np.testing.assert_array_equal(few.sparsity, all_of_them.sparsity[few.steps])
    sizes.clear()
    most = dlc.probe(
        sample_encoder, small_sample, num_probes="auto", **options, path=dlc.PathSpec(agreement=1.0)
    )
    assert sizes == [5, 10, 5]
    np.testing.assert_array_equal(most.losses, all_of_them.losses)
    with pytest.raises(ValueError, match=r"probe\.agreement"):
        dlc.probe(sample_encoder, small_sample, num_probes="auto", path=dlc.PathSpec(agreement=1.5))


@pytest.mark.slow
def test_auto_goes_on_where_it_was_stopped(sample_encoder, small_sample, tmp_path, monkeypatch):
    path = dlc.PathSpec(step=0.05, num_probes="auto", agreement=1.0)
    options = {"image_size": 32, "path": path}
    expected = dlc.probe(sample_encoder, small_sample, **options)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dlc_jax.probes.path.certify", fail)
        with pytest.raises(KeyboardInterrupt):
            dlc.probe(sample_encoder, small_sample, **options, run=dlc.Run(folder=tmp_path))
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("losses-*.npz")}
    assert first
    again = dlc.probe(sample_encoder, small_sample, **options, run=dlc.Run(folder=tmp_path))
    np.testing.assert_array_equal(again.losses, expected.losses)
    assert {path: path.stat().st_mtime_ns for path in first} == first
