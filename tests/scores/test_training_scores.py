"""Each training-based score against a straightforward implementation in NumPy or torch."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import random_record

from dlc_jax.scores import entropy, forgetting, least_confidence, margin, score
from dlc_jax.training.images import FinetuneConfig, RecordConfig, record_training
from dlc_jax.types import TrainingRecord

BOTH = ("published", "deepcore")


@pytest.fixture(scope="module")
def real_record(sample_encoder, small_sample) -> TrainingRecord:
    return record_training(
        sample_encoder,
        small_sample,
        epochs=4,
        image_size=32,
        batch_size=16,
        learning_rate=0.05,
        settings=FinetuneConfig(linear_probe=True),
        record=RecordConfig(2, 0.5),
    )


@pytest.fixture(params=["noise", "real"])
def record(request) -> TrainingRecord:
    """Of 43 samples, so that the last batch is short; or of a run of four epochs."""
    if request.param == "noise":
        return random_record(num=43)
    return request.getfixturevalue("real_record")


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


def expected_uncertainty(method: str, row: np.ndarray) -> float:
    p = np.sort(softmax(row))[::-1]
    return {
        "least_confidence": 1 - p[0],
        "entropy": -sum(value * np.log(value) for value in p),
        "margin": 1 - (p[0] - p[1]),
    }[method]


@pytest.mark.parametrize("method", ["least_confidence", "entropy", "margin"])
def test_uncertainty(record, method):
    expected = [expected_uncertainty(method, row) for row in record.logits]
    np.testing.assert_allclose(score(record, method=method), expected, rtol=1e-5, atol=1e-6)


def test_deepcores_least_confidence_is_the_raw_logit(record):
    expected = [-max(row) for row in record.logits.tolist()]
    found = score(record, method="least_confidence", variant="deepcore")
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("variant", BOTH)
def test_forgetting(record, variant):
    expected = []
    for history in record.correct.T.tolist():
        count = sum(before and not after for before, after in itertools.pairwise(history))
        if not any(history) and variant == "published":
            count = len(history)
        expected.append(count)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(score(record, method="forgetting", variant=variant), expected)


def test_el2n(record):
    onehot = np.eye(len(record.class_names))[record.labels]
    expected = np.linalg.norm(softmax(record.early_logits) - onehot, axis=2).mean(axis=0)
    np.testing.assert_allclose(score(record, method="el2n"), expected, rtol=1e-5)


@pytest.mark.parametrize("variant", BOTH)
def test_grand_is_the_norm_of_torchs_gradient(record, variant):
    """Of one sample after the other, by all parameters of a linear layer with that output."""
    torch = pytest.importorskip("torch")
    num_runs, num, num_classes = record.early_logits.shape
    generator = torch.Generator().manual_seed(0)
    expected = np.zeros((num_runs, num))
    for run in range(num_runs):
        for i in range(num):
            feature = torch.randn(6, generator=generator, dtype=torch.float64)
            feature *= float(record.early_squared_norms[run, i]) ** 0.5 / feature.norm()
            layer = torch.nn.Linear(6, num_classes, dtype=torch.float64)
            wanted = torch.from_numpy(record.early_logits[run, i].astype(np.float64))
            with torch.no_grad():
                layer.bias += wanted - layer(feature)
            label = torch.tensor(int(record.labels[i]))
            loss = torch.nn.functional.cross_entropy(layer(feature)[None], label[None])
            if variant == "deepcore":
                start = i - i % record.batch_size
                loss = loss / len(range(start, min(start + record.batch_size, num)))
            loss.backward()
            gradient = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
            expected[run, i] = gradient.norm()
    found = score(record, method="grand", variant=variant)
    np.testing.assert_allclose(found, expected.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_el2n_of_the_paper_is_that_of_the_last_epoch(record):
    torch = pytest.importorskip("torch")
    errors = torch.softmax(torch.from_numpy(record.logits).double(), dim=1)
    errors[torch.arange(len(errors)), torch.from_numpy(record.labels).long()] -= 1
    found = score(record, method="el2n", variant="paper")
    np.testing.assert_allclose(found, errors.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_grand_by_real_features_and_weights():
    """The whole definition, from features on, with DeepCore's batches as torch averages them."""
    torch = pytest.importorskip("torch")
    num, num_classes, batch_size = 11, 5, 4
    features = torch.randn(num, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(num) % num_classes
    layer = torch.nn.Linear(8, num_classes)
    logits = layer(features)
    record = dataclasses.replace(
        random_record(num, num_classes, runs=1, batch=batch_size),
        early_logits=logits.detach().numpy()[None],
        early_squared_norms=features.square().sum(1).numpy()[None],
        labels=labels.numpy().astype(np.int32),
    )
    own, of_batch = [], []
    for start in range(0, num, batch_size):
        some = slice(start, start + batch_size)
        output = layer(features[some])
        for reduction, found in (("sum", own), ("mean", of_batch)):
            loss = torch.nn.functional.cross_entropy(output, labels[some], reduction=reduction)
            (rows,) = torch.autograd.grad(loss, output, retain_graph=True)
            outer = rows[:, :, None] * features[some][:, None]
            found.extend(torch.cat([rows, outer.flatten(1)], dim=1).norm(dim=1).tolist())
    np.testing.assert_allclose(score(record, method="grand"), own, rtol=1e-5)
    found = score(record, method="grand", variant="deepcore")
    np.testing.assert_allclose(found, of_batch, rtol=1e-5)
    # 8 samples in batches of four and a last batch of three
    np.testing.assert_allclose(found * ([4] * 8 + [3] * 3), own, rtol=1e-5)


def test_certain_predictions_are_still_told_apart():
    """Where 1 - p in float32 is 0 for all."""
    logits = jnp.array([[20.0, 0, 0], [25.0, 0, 0], [40.0, 0, 0], [1e4, 0, -1e4]])
    for compute in (least_confidence, margin):
        scores = np.asarray(compute(logits))
        assert (np.diff(scores) < 0).all()
        assert scores[-1] == 0
    np.testing.assert_allclose(least_confidence(logits)[:2], 2 * np.exp([-20.0, -25]), rtol=1e-5)
    assert entropy(logits)[-1] == 0


def test_a_single_class_is_certain():
    logits = jnp.array([[3.0], [-2.0]])
    for compute in (least_confidence, margin, entropy):
        np.testing.assert_array_equal(compute(logits), [0, 0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(-50, 50), st.floats(0.01, 30))
def test_uncertainty_is_in_range_and_no_shift_of_logits_matters(seed, shift, scale):
    logits = (scale * np.random.default_rng(seed).normal(size=(6, 4))).astype(np.float32)
    limits = {least_confidence: 3 / 4, margin: 1, entropy: np.log(4)}
    for compute, limit in limits.items():
        scores = np.asarray(compute(jnp.asarray(logits)))
        assert (scores >= 0).all()
        assert (scores <= limit + 1e-5).all()
        shifted = compute(jnp.asarray(logits + np.float32(shift)))
        np.testing.assert_allclose(shifted, scores, rtol=1e-3, atol=1e-5)
        permuted = compute(jnp.asarray(logits[:, ::-1].copy()))
        np.testing.assert_allclose(permuted, scores, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@example([False] * 7)
@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_only_never_learned_samples_reach_the_number_of_epochs(history):
    correct = jnp.array(history)[:, None]
    (published,), (deepcore,) = (forgetting(correct, variant=variant) for variant in BOTH)
    assert (published == len(history)) == (not any(history))
    assert deepcore == (published if any(history) else 0)
    assert deepcore <= len(history) // 2
