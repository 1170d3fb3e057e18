"""What holds for every score, and what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from records import NAMES, random_record, reordered

import dlc_jax as dlc
from dlc_jax.scores import SCORES, score
from dlc_jax.types import ResponseLosses, TrainingRecord

EVERY = [(name, variant) for name, entry in SCORES.items() for variant in entry.variants]
OF_TRAINING = [pair for pair in EVERY if SCORES[pair[0]].of == "training"]
every_score = pytest.mark.parametrize(("method", "variant"), EVERY)


def random_losses(num: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(2.7, 0.02, (50, num)).astype(np.float32)


def random_responses(num: int = 40) -> ResponseLosses:
    generator = np.random.default_rng(0)
    return ResponseLosses(
        losses=generator.uniform(1, 3, num).astype(np.float32),
        alone=generator.uniform(2, 4, num).astype(np.float32),
        num_tokens=generator.integers(1, 99, num),
        ids=np.arange(num).astype(np.str_),
        after_prefix=generator.uniform(1.5, 3.5, num).astype(np.float32),
        changes=tuple(
            generator.normal(-0.3, 1, num_tokens).astype(np.float32)
            for num_tokens in generator.integers(1, 99, num)
        ),
    )


NOISE = {"losses": random_losses, "training": random_record, "responses": random_responses}


def noise(method: str):
    return NOISE[SCORES[method].of]()


def fields(of) -> dict:
    """Returns the arrays that a score may look at."""
    if isinstance(of, np.ndarray):
        return {"losses": of}
    names = (
        NAMES
        if isinstance(of, TrainingRecord)
        else ("losses", "alone", "num_tokens", "after_prefix", "changes")
    )
    return {name: getattr(of, name) for name in names}


def test_the_names_are_the_fields():
    expected = "dlc least_confidence entropy margin forgetting grand el2n perplexity ifd length"
    assert list(SCORES) == expected.split()
    with_quirks = [name for name, entry in SCORES.items() if "deepcore" in entry.variants]
    assert with_quirks == ["least_confidence", "forgetting", "grand"]


@every_score
def test_one_finite_float32_per_sample_and_the_input_is_left_alone(method, variant):
    of = noise(method)
    before = fields(noise(method))
    scores = score(of, method=method, variant=variant)
    assert (scores.shape, scores.dtype) == ((40,), np.dtype(np.float32))
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    scores[0] = 0  # the caller's own
    for name, value in fields(of).items():
        for own, given in zip(value, before[name], strict=True):
            np.testing.assert_array_equal(own, given)


@every_score
def test_the_same_twice(method, variant):
    one, two = (score(noise(method), method=method, variant=variant) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@every_score
def test_the_order_of_the_samples_does_not_matter(method, variant):
    """For DeepCore's grand as long as batches are equally large."""
    order = np.random.default_rng(1).permutation(40)
    of = noise(method)
    if isinstance(of, ResponseLosses):
        parts = {name: value[order] for name, value in fields(of).items() if name != "changes"}
        parts["changes"] = tuple(of.changes[i] for i in order)
        other = dataclasses.replace(of, **parts)
    else:
        other = of[:, order] if isinstance(of, np.ndarray) else reordered(of, order)
    np.testing.assert_allclose(
        score(other, method=method, variant=variant),
        score(of, method=method, variant=variant)[order],
        rtol=1e-6,
    )


@pytest.mark.parametrize(("method", "variant"), OF_TRAINING)
def test_compiled_is_eager(method, variant):
    record = random_record()

    def compute(arrays):
        of = SimpleNamespace(**arrays, batch_size=record.batch_size)
        return SCORES[method].compute(of, variant)

    arrays = {name: jax.numpy.asarray(getattr(record, name)) for name in NAMES}
    with jax.disable_jit():
        eager = compute(arrays)
    np.testing.assert_allclose(jax.jit(compute)(arrays), eager, rtol=2e-6)
    np.testing.assert_array_equal(score(record, method=method, variant=variant), compute(arrays))


@every_score
def test_higher_is_harder(method, variant):
    """Sample 0 is easy, 1 in between, 2 hard, in whatever a method looks at."""
    logits = np.array([[6, 0, 0], [1, 0, 0], [0.1, 0, 0]], np.float32)
    record = TrainingRecord(
        correct=np.array([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool),
        logits=logits,
        early_logits=np.stack([logits, logits / 2]),
        early_squared_norms=np.full((2, 3), 4, np.float32),
        early_epoch=1,
        batch_size=2 if variant == "published" else 3,
        labels=np.zeros(3, np.int32),
        ids=np.array(["a", "b", "c"]),
        class_names=("x", "y", "z"),
        seconds=0.0,
        num_epochs=5,
    )
    losses = np.array([[1, 2, 3], [1, 3, 4]], np.float32)
    responses = ResponseLosses(
        losses[0],
        np.full(3, 4, np.float32),
        np.array([1, 2, 3]),
        record.ids,
        np.full(3, 5, np.float32),
        changes=tuple(np.array([i / 2 - 3, -0.1], np.float32) for i in range(3)),
    )
    of = {"training": record, "losses": losses, "responses": responses}[SCORES[method].of]
    scores = score(of, method=method, variant=variant)
    assert scores[0] < scores[1] < scores[2]


def test_dlc_is_the_mean_over_probes_of_own_losses():
    losses = random_losses(9)
    scores = dlc.score(losses)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, losses.astype(np.float64).mean(0).astype(np.float32))


def probes() -> dlc.ProbeLosses:
    return dlc.ProbeLosses(
        losses=np.arange(6, dtype=np.float32).reshape(2, 3),
        sparsity=np.zeros(2, np.float32),
        labels=np.zeros(3, np.int32),
        ids=np.array(["a", "b", "c"]),
        prototypes=np.zeros((1, 1), np.float32),
        class_names=("x",),
    )


def test_scores_of_probes_are_scores_of_their_losses():
    np.testing.assert_array_equal(dlc.score(probes()), [1.5, 2.5, 3.5])


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match=r"matrix \[m, n\]"):
        dlc.score(np.zeros(3))
    with pytest.raises(ValueError, match="sample 1 at probe 0"):
        dlc.score(np.array([[0.0, np.nan]]))


@pytest.mark.parametrize(
    ("of", "arguments", "says"),
    [
        (random_losses, {"method": "el2n"}, r"'el2n': needs a TrainingRecord, as dlc\.record_tr"),
        (random_losses, {"method": "el2n"}, r"got an array \(50, 40\)"),
        (probes, {"method": "margin"}, "needs a TrainingRecord.*got ProbeLosses"),
        (random_record, {}, r"'dlc': needs losses, as dlc\.probe.*got TrainingRecord"),
        (random_record, {"method": "forgeting"}, "Did you mean 'forgetting'"),
        (random_record, {"method": "grand", "variant": "deepcor"}, "Did you mean 'deepcore'"),
        (random_record, {"method": "el2n", "variant": "deepcore"}, "valid: published, paper"),
        (random_losses, {"variant": "deepcore"}, "variant of the score dlc: unknown value"),
    ],
)
def test_what_does_not_go_together_is_told(of, arguments, says):
    with pytest.raises(dlc.InputError, match=says):
        score(of(), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["logits", "early_logits", "early_squared_norms"])
def test_values_that_are_not_finite_name_the_sample(name, bad):
    record = random_record()
    values = getattr(record, name).copy()
    np.moveaxis(values, NAMES[name], 0)[[7, 11]] = bad
    record = dataclasses.replace(record, **{name: values})
    with pytest.raises(dlc.InputError, match=f"{name} of 2 samples are not finite, .* s7"):
        score(record, method="entropy")


def test_labels_out_of_range_are_refused():
    labels = random_record().labels.copy()
    labels[3] = 7
    record = dataclasses.replace(random_record(), labels=labels)
    with pytest.raises(dlc.InputError, match=r"labels must be in 0\.\.6, found 0\.\.7"):
        score(record, method="el2n")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("logits", np.zeros((39, 7)), r"logits has shape \(39, 7\), expected \(40, 7\)"),
        ("early_squared_norms", np.zeros((2, 40)), r"early_squared_norms has shape \(2, 40\)"),
        ("correct", np.zeros((0, 40), bool), "no empty axis"),
        ("ids", np.arange(41), r"ids has shape \(41,\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(name, value, says):
    record = random_record()
    object.__setattr__(record, name, value)  # past the tests' run-time checks of annotations
    with pytest.raises(dlc.InputError, match=says):
        score(record, method="entropy")


def test_probabilities_are_the_softmax_of_the_last_logits():
    record = random_record()
    powers = np.exp(record.logits.astype(np.float64))
    expected = powers / powers.sum(axis=1, keepdims=True)
    found = record.probabilities
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)
    huge = dataclasses.replace(record, logits=record.logits * np.float32(1e4)).probabilities
    np.testing.assert_allclose(huge.sum(axis=1), 1, rtol=1e-6)


def test_scores_of_responses_by_hand():
    responses = ResponseLosses(
        losses=np.array([0.5, 2.0], np.float32),
        alone=np.array([1.0, 1.6], np.float32),
        num_tokens=np.array([3, 8]),
        ids=np.array(["a", "b"]),
    )
    np.testing.assert_allclose(score(responses, method="perplexity"), np.exp([0.5, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(score(responses, method="ifd"), [0.5, 1.25])
    ratio = np.exp([0.5, 2.0]) / np.exp([1.0, 1.6])
    found = score(responses, method="ifd", variant="superfiltering")
    np.testing.assert_allclose(found, ratio, rtol=1e-6)
    np.testing.assert_array_equal(score(responses, method="length"), [3, 8])
    with pytest.raises(ValueError, match="variant 'cherry' needs after_prefix"):
        score(responses, method="ifd", variant="cherry")
    behind = dataclasses.replace(responses, after_prefix=np.array([0.625, 1.9], np.float32))
    # the second, at 2.0 / 1.9, is dropped by the code of the paper
    np.testing.assert_allclose(score(behind, method="ifd", variant="cherry"), [0.8, 0])
    kept = dlc.select(
        np.array([0.8, 0, 0.1]), np.zeros(3, int), method="hardest", keep_fraction=0.7
    )
    assert kept.indices.tolist() == [0, 2]
    certain = dataclasses.replace(responses, alone=np.array([1, 0], np.float32))
    with pytest.raises(
        ValueError, match="1 responses have no loss without their prompt, such as b"
    ):
        score(certain, method="ifd")
    with pytest.raises(ValueError, match="needs ResponseLosses"):
        score(random_losses(), method="perplexity")
    with pytest.raises(ValueError, match=r"needs losses, as dlc\.probe"):
        score(responses)


def test_t_shirt_is_that_of_torch():
    """Of the half of all tokens that change most, where the prompt helps at all."""
    import torch

    of = random_responses()
    changes = [torch.asarray(some) for some in of.changes]
    threshold = np.percentile(np.abs(np.concatenate(of.changes)), 50)
    expected = []
    for some, given, alone in zip(changes, of.losses, of.alone, strict=True):
        counts = some.abs() > threshold
        value = torch.exp((some * counts).sum() / counts.sum().clamp(min=1)).item()
        expected.append(value if np.exp(given) / np.exp(alone) < 1 else 0)
    assert 0 < np.count_nonzero(expected) < len(expected)
    found = score(of, method="ifd", variant="t_shirt")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="variant 't_shirt' needs changes"):
        score(dataclasses.replace(of, changes=None), method="ifd", variant="t_shirt")
    empty = dataclasses.replace(of, changes=(*of.changes[:-1], np.zeros(0, np.float32)))
    with pytest.raises(ValueError, match="such as 39; expected responses whose tokens are the"):
        score(empty, method="ifd", variant="t_shirt")


@pytest.mark.parametrize("variant", SCORES["ifd"].variants)
def test_a_response_of_one_token_has_no_ratio(variant):
    of = random_responses()
    for name in ("alone", "after_prefix"):
        losses = getattr(of, name).copy()
        losses[7] = np.nan
        of = dataclasses.replace(of, **{name: losses})
    with pytest.raises(ValueError, match="1 responses have no loss .* such as 7; .* two tokens"):
        score(of, method="ifd", variant=variant)
