"""What `auto` stands for: chosen on held-out training data, and only beyond noise."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import slow_but
from scipy import stats

import dlc_jax as dlc
from dlc_jax.tuning import FinetuneTrials, Trial
from dlc_jax.tuning.gaps import HeldOut, gap, mean_accuracy
from dlc_jax.tuning.tune import _choices
from dlc_jax.types import Choice, Gap, Tried, Tuning
from dlc_jax.workspace import records

FAST = dlc.LinearProbeConfig(epochs=8, batch_size=32, learning_rate=0.1)


def noisy_labels(num: int = 400, share: float = 0.35, seed: int = 0):
    """Four classes; a share of the labels is wrong, and the scores know which."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 4, num)
    features = generator.normal(size=(num, 8)) + 2.0 * np.eye(4, 8)[truth]
    wrong = generator.random(num) < share
    labels = np.where(wrong, (truth + generator.integers(1, 4, num)) % 4, truth)
    scores = wrong + 0.1 * generator.random(num)
    return scores.astype(np.float32), labels, features.astype(np.float32)


@pytest.fixture(scope="module")
def tuned():
    scores, labels, features = noisy_labels()
    found = dlc.tune(
        scores, labels, features=features, keep_fractions=(0.3, 0.6), trials=FAST, splits=(0.3,)
    )
    return found, scores, labels


def test_where_hard_means_mislabelled_the_easiest_are_chosen(tuned):
    found, _, _ = tuned
    rows = {(row.keep_fraction, row.method, row.split): row for row in found.tried}
    assert len(rows) == 2 * (6 + 2)
    for keep in (0.3, 0.6):
        choice = found.choice(keep)
        assert choice.method == "easiest"
        assert found.row(*choice[:3]).to_random.mean > 3
        assert "points, beyond noise" in choice.why
        assert rows[keep, "hardest", None].to_random.mean < -5
        assert found.choice(keep, of="splits").split in (0.3, 0.5)
    assert found.num_repeats == 25
    assert rows[0.3, "random", None].to_random == Gap(0.0, 0.0, 1.0)


@pytest.mark.parametrize("seed", slow_but([1], [1, 2]))
def test_where_scores_say_nothing_random_is_chosen(seed):
    _, labels, features = noisy_labels(300, seed=seed)
    scores = np.random.default_rng(seed).normal(size=300)
    found = dlc.tune(
        scores,
        labels,
        features=features,
        keep_fractions=(0.2, 0.5),
        methods=("easiest", "hardest", "flexrand", "ccs"),  # features do say something
        trials=FAST,
        num_repeats=10,
    )
    assert [choice.method for choice in found.methods] == ["random", "random"]
    assert [choice.split for choice in found.splits] == [0.5, 0.5]
    for choice in (*found.methods, *found.splits):
        assert "nothing is better beyond noise" in choice.why


class _Watched:
    """Trials that look at what they are given; the outcome is that of a coin."""

    name = "coin"

    def __init__(self):
        self.held_out, self.kept = [], []

    def __call__(self, trials: list[Trial], held_out: np.ndarray, /) -> np.ndarray:
        for trial in trials:
            assert len(np.intersect1d(trial.positions, held_out)) == 0
            assert np.all(np.diff(trial.positions) > 0)
        self.held_out.append(held_out)
        self.kept.append(trials)
        coin = np.random.default_rng(len(self.held_out))
        return coin.random((len(trials), len(held_out))) < 0.5


def test_every_sample_is_held_out_equally_often_and_never_trained_on():
    labels = np.repeat([0, 1, 2], [50, 23, 4])
    scores = np.random.default_rng(0).normal(size=77)
    watched = _Watched()
    found = dlc.tune(scores, labels, trials=watched, keep_fractions=(0.5,), num_repeats=10)
    counts = np.bincount(np.concatenate(watched.held_out), minlength=77)
    assert counts.tolist() == [2] * 77
    for held_out in watched.held_out:
        assert np.bincount(labels[held_out])[0] == 10
    for repeat, trials in enumerate(watched.kept):
        fit = np.setdiff1d(np.arange(77), watched.held_out[repeat])
        np.testing.assert_array_equal(trials[0].positions, fit)  # the full set
        assert {trial.seed for trial in trials} == {repeat}
        # random, easiest, hardest, 19 splits, ccs; no features for the others. Each is what
        # `select` keeps of the rest
        assert len(trials) == 1 + 4 + 19
        alone = dlc.select(
            scores[fit], labels[fit], method="easiest", keep_fraction=0.5, seed=repeat
        )
        np.testing.assert_array_equal(trials[2].positions, fit[alone.indices])
    assert found.trained == "coin"
    again = dlc.tune(scores, labels, trials=_Watched(), keep_fractions=(0.5,), num_repeats=10)
    assert again.tried == found.tried


def test_with_ids_the_order_of_samples_decides_nothing():
    generator = np.random.default_rng(0)
    labels, scores = np.repeat([0, 1, 2], [50, 23, 4]), generator.integers(0, 9, 77) / 9
    ids, order = np.array([f"{i:b}" for i in range(77)]), generator.permutation(77)
    kept = []
    for rows in (np.arange(77), order):
        watched = _Watched()
        settings = {"keep_fractions": (0.5,), "num_repeats": 5, "methods": ("flexrand", "ccs")}
        dlc.tune(scores[rows], labels[rows], ids=ids[rows], trials=watched, **settings)
        trials = [trial for repeat in watched.kept for trial in repeat]
        kept.append([set(ids[rows][trial.positions]) for trial in trials])
    assert kept[0] == kept[1]
    fit = np.sort(np.concatenate(watched.held_out[1:]))  # what the first repeat trains on
    alone = dlc.select(
        scores[order][fit], labels[order][fit], keep_fraction=0.5, split=0.5, ids=ids[order][fit]
    )
    assert set(alone.ids) in kept[1][:22]


def points(one, other):
    return 100.0 * (one.astype(int) - other)


def test_a_gap_is_computed_as_it_says():
    """Four samples in two partitions of two repeats each; by hand."""
    held_out = HeldOut(np.array([[0, 0, 1, 1], [2, 3, 2, 3]]), 4)
    one = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool)
    other = np.array([[0, 1, 0, 0], [1, 1, 0, 0]], bool)
    samples = np.array([0.5, -0.5, 0.5, 1.0])  # means over partitions
    repeats = np.array([[1, 0], [0, 1], [0, 1], [-1, 1]])  # what each showed
    of_samples, of_repeats = samples.var(ddof=1) / 4, repeats.mean(axis=1).var(ddof=1) / 4
    of_both = ((repeats - repeats.mean(axis=1, keepdims=True)) ** 2).sum() / 4 / 8
    variance = of_samples + max(of_repeats - of_both, 0)
    freedom = variance**2 / (of_samples**2 / 3 + of_repeats**2 / 3)
    found = gap(points(one, other), held_out)
    assert found.mean == pytest.approx(100 * samples.mean())
    half = 100 * stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert found.half_width == pytest.approx(half)
    p_value = stats.t.sf(samples.mean() / math.sqrt(variance), freedom)
    assert found.p_value == pytest.approx(p_value)
    assert mean_accuracy(one, held_out) == pytest.approx(100 * (1 + 0.5 + 0.5 + 1) / 4)
    assert gap(points(one, one), held_out) == Gap(0.0, 0.0, 1.0)
    assert gap(points(other, one), held_out).mean == pytest.approx(-found.mean)


def test_samples_that_were_held_out_less_often_count_as_much():
    """The last partition was not finished, and one sample was never held out."""
    held_out = HeldOut(np.array([[0, 1, 1, -1], [2, -1, 2, -1]]), 3)
    one = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    assert mean_accuracy(one, held_out) == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    found = gap(points(one, np.zeros_like(one)), held_out)
    assert found.mean == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    assert 0 < found.half_width < 1000


def test_a_difference_that_never_varies_is_not_beyond_noise():
    held_out = HeldOut(np.array([[0, 0, 1, 1], [2, 3, 2, 3]]), 4)
    always, never = np.ones((2, 4), bool), np.zeros((2, 4), bool)
    assert gap(points(always, never), held_out) == Gap(100.0, 0.0, 1.0)
    assert gap(points(never, always), held_out) == Gap(-100.0, 0.0, 1.0)


@pytest.mark.parametrize("true_gap", [0.0, 0.05])
@pytest.mark.parametrize("own", [0.3, 0.0])  # what samples differ by
def test_intervals_of_gaps_hold_the_truth_often_enough(true_gap, own):
    """Samples and repeats vary; of 95 % intervals, 99 % would be wider than they need be."""
    generator = np.random.default_rng(0)
    num, covered, mistaken, num_sets = 200, 0, 0, 600
    held_out = HeldOut(np.stack([5 * p + (np.arange(num) + p) % 5 for p in range(5)]), 25)
    for _ in range(num_sets):
        sample = generator.uniform(-own, own, (2, num))  # not the same twice: sums are random too
        run = generator.normal(0, 0.03, (25, 2))[held_out.repeat]
        worse, better = (
            generator.random((5, num)) < 0.5 + gain + sample[way] + run[..., way]
            for way, gain in enumerate((0.0, true_gap))
        )
        found = gap(points(better, worse), held_out)
        covered += abs(found.mean - 100 * true_gap) <= found.half_width
        mistaken += found.p_value < 0.05
    assert 0.93 * num_sets <= covered <= 0.985 * num_sets
    if true_gap == 0:
        assert mistaken <= 0.05 * num_sets + 3 * math.sqrt(num_sets * 0.05 * 0.95)


class _Coins:
    """Trials whose held-out samples are right with a probability that the trial has."""

    name = "coins"

    def __init__(self, seed, probability):
        self._generator, self._probability = np.random.default_rng(seed), probability

    def __call__(self, trials: list[Trial], held_out: np.ndarray, /) -> np.ndarray:
        chances = np.array([self._probability(trial) for trial in trials])
        return self._generator.random((len(trials), len(held_out))) < chances[:, None]


def test_where_nothing_is_better_auto_is_random():
    """In at most 5 % of data sets something else is chosen at a keep fraction."""
    scores, labels, mistaken, num_sets = np.arange(60.0), np.repeat([0, 1], 30), 0, 40
    for seed in range(num_sets):
        coins = _Coins(seed, lambda trial: 0.7)
        found = dlc.tune(
            scores, labels, trials=coins, keep_fractions=(0.5,), splits=(0.2,), num_repeats=10
        )
        mistaken += found.choice(0.5).method != "random"
    assert mistaken <= 0.05 * num_sets + 2 * math.sqrt(num_sets * 0.05 * 0.95)


def test_what_is_better_is_mostly_found():
    """Ten points, of 60 samples; the keep fractions of `easiest` alone have no hard sample."""
    scores, labels, num_found = np.arange(60.0), np.repeat([0], 60), 0
    for seed in range(20):
        coins = _Coins(seed, lambda trial: 0.8 if trial.positions.max() < 40 else 0.7)
        found = dlc.tune(
            scores, labels, trials=coins, keep_fractions=(0.5,), methods=("easiest", "hardest")
        )
        num_found += found.choice(0.5).method == "easiest"
    assert num_found >= 10


@pytest.mark.slow
def test_a_little_at_every_keep_fraction_is_found_together():
    """Four points of 150 samples at each of five keep fractions, which one alone seldom shows."""
    scores, labels, found = np.arange(150.0), np.zeros(150, int), np.zeros((2, 10))
    for seed in range(10):
        for row, keeps in enumerate([(0.1, 0.2, 0.3, 0.4, 0.5), (0.3,)]):
            # the easiest have no hard sample
            coins = _Coins(seed, lambda trial: 0.74 if trial.positions.max() < 90 else 0.7)
            tuning = dlc.tune(
                scores, labels, trials=coins, keep_fractions=keeps, methods=("easiest", "hardest")
            )
            found[row, seed] = np.mean([choice.method == "easiest" for choice in tuning.methods])
            assert "hardest" not in [choice.method for choice in tuning.methods]
    assert found[0].mean() > 0.5
    assert found[1].mean() < found[0].mean() - 0.2


def test_what_is_better_where_little_is_kept_is_not_taken_where_much_is():
    scores, labels = np.arange(150.0), np.zeros(150, int)
    coins = _Coins(0, lambda t: 0.6 if len(t.positions) < 70 and t.positions.max() < 90 else 0.4)
    tuning = dlc.tune(
        scores,
        labels,
        trials=coins,
        keep_fractions=(0.2, 0.4, 0.7, 0.9),
        methods=("easiest", "hardest"),
    )
    methods = [choice.method for choice in tuning.methods]
    assert methods == ["easiest", "easiest", "random", "random"]


def test_auto_selects_what_was_chosen(tuned):
    found, scores, labels = tuned
    for keep in (0.3, 0.6):
        auto = dlc.select(scores, labels, method="auto", keep_fraction=keep, tuning=found, seed=4)
        choice = found.choice(keep)
        plain = dlc.select(scores, labels, method=choice.method, keep_fraction=keep, seed=4)
        np.testing.assert_array_equal(auto.indices, plain.indices)
        assert (auto.method, auto.split, auto.chosen) == ("auto", None, choice)
        auto = dlc.select(scores, labels, split="auto", keep_fraction=keep, tuning=found, seed=4)
        choice = found.choice(keep, of="splits")
        plain = dlc.select(scores, labels, keep_fraction=keep, split=choice.split, seed=4)
        np.testing.assert_array_equal(auto.indices, plain.indices)
        assert (auto.method, auto.split, auto.chosen) == ("flexrand", "auto", choice)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tuning": None}, r"needs scores and tuning=dlc\.tune"),
        ({"keep_fraction": 0.4}, r"0\.4 was not tuned; tuned are 0\.3, 0\.6"),
        ({"mode": "official"}, "mode 'official' has no 'auto'"),
        ({"method": "easiest", "split": "auto"}, "takes none"),
        ({"method": "flexrand", "split": "best"}, "auto"),
        ({"split": "auto"}, "takes none"),
        ({"rules": dlc.Rules(min_per_class=1)}, "min_per_class: tuned with 0, got 1"),
        ({"rules": dlc.Rules(allocation="nucs")}, "is tuned with allocation='proportional'"),
        ({"rules": dlc.Rules(per_class=False)}, "per_class=True, got 'proportional' and False"),
        ({"method": "easiest"}, "tuning: is for method or split 'auto', got method 'easiest'"),
    ],
)
def test_auto_that_cannot_be_had(tuned, changes, says):
    found, scores, labels = tuned
    arguments = {"method": "auto", "keep_fraction": 0.3, "tuning": found} | changes
    with pytest.raises(ValueError, match=says):
        dlc.select(scores, labels, **arguments)


def test_a_tuning_of_other_scores_is_refused(tuned):
    found, scores, labels = tuned
    with pytest.raises(ValueError, match="made from other scores or labels"):
        dlc.select(scores[::-1], labels, method="auto", keep_fraction=0.3, tuning=found)


def test_the_best_of_those_beyond_noise_is_chosen():
    """The highest mean may be noise where a lower one is not."""

    def row(method, mean, p_value):
        return Tried(0.3, method, None, 80 + mean, Gap(mean, 1, p_value), Gap(0, 1, 1), None)

    def chosen(*rows):
        p_values = {row.method: len(rows[1:]) * row.to_random.p_value for row in rows}

        def corrected(reference, keep_fractions, ways):
            assert (reference, list(keep_fractions)) == (("random", None), [0.3])
            return [p_values[method] for method, _ in ways]

        (choice,) = _choices(list(rows), ("random", None), "to_random", "random pruning", corrected)
        return choice

    random = row("random", 0, 1)
    lucky, sure, less = row("hardest", 5, 0.02), row("easiest", 3, 0.001), row("ccs", 2, 1e-6)
    choice = chosen(random, lucky, sure, less)
    assert choice[:3] == (0.3, "easiest", None)
    assert "+3.00 ± 1.00" in choice.why
    assert "of 3 compared" in choice.why
    # 0.02 is not beyond noise among three, and is alone
    assert chosen(random, lucky, row("ccs", 1, 0.5), row("easiest", 1, 0.5))[1] == "random"
    assert chosen(random, lucky)[1] == "hardest"
    assert chosen(random, row("easiest", -4, 1e-6))[1] == "random"
    assert "nothing else was tried" in chosen(random).why


@pytest.mark.parametrize("num", slow_but([5], [5, 7, 12]))
def test_small_sets_can_be_tuned_whatever_the_seed(num):
    """Every part holds something out, however small the classes."""
    labels = np.arange(num) // 2
    for seed in range(10):
        watched = _Watched()
        dlc.tune(
            np.arange(float(num)),
            labels,
            trials=watched,
            keep_fractions=(0.9,),
            num_repeats=5,
            min_per_class=1,
            seed=seed,
        )
        assert sorted(np.concatenate(watched.held_out).tolist()) == list(range(num))
        assert all(len(part) for part in watched.held_out)


def test_a_choice_that_uses_features_takes_those_that_were_tuned(tuned):
    found, scores, labels = tuned
    _, _, features = noisy_labels()
    herding = tuple(choice._replace(method="herding", split=None) for choice in found.methods)
    found = dataclasses.replace(found, methods=herding)
    arguments = {"method": "auto", "keep_fraction": 0.3, "tuning": found}
    kept = dlc.select(scores, labels, features=features, **arguments)
    plain = dlc.select(None, labels, method="herding", keep_fraction=0.3, features=features)
    np.testing.assert_array_equal(kept.indices, plain.indices)
    with pytest.raises(ValueError, match="made from other features"):
        dlc.select(scores, labels, features=features[::-1], **arguments)
    with pytest.raises(ValueError, match="features"):
        dlc.select(scores, labels, **arguments)


def curve_of(gaps: dict[float, tuple[float, float]]) -> Tuning:
    """A tuning with these gaps to the full set, mean and half width."""
    rows = [
        Tried(keep, "random", None, 80 + mean, Gap(0, 0, 1), Gap(mean, half, 0.5), None)
        for keep, (mean, half) in gaps.items()
    ]
    choices = tuple(Choice(row.keep_fraction, "random", None, "") for row in rows)
    return Tuning(tuple(rows), choices, (), 80.0, "linear_probe", 10, 0, "", None, 0.0)


def test_the_smallest_keep_fraction_that_will_do():
    tuning = curve_of(
        {0.1: (-20, 3), 0.3: (-0.9, 1), 0.5: (-1.5, 1), 0.7: (-0.5, 1), 0.9: (0.2, 0.5)}
    )
    curve = dlc.keep_curve(tuning)
    assert (curve.smallest, curve.surely) == (0.7, 0.9)  # 0.3 was lucky
    assert (dlc.keep_curve(tuning, tolerance=1.6).smallest) == 0.3
    assert (dlc.keep_curve(tuning, tolerance=0, method="random").smallest) == 0.9
    assert dlc.keep_curve(curve_of({0.5: (-3, 1)})).smallest == 1.0
    assert [row.keep_fraction for row in curve.rows] == [0.1, 0.3, 0.5, 0.7, 0.9]
    with pytest.raises(ValueError, match="'hardest' was not tried; tried: auto, random"):
        dlc.keep_curve(tuning, method="hardest")
    with pytest.raises(ValueError, match="tolerance"):
        dlc.keep_curve(tuning, tolerance=-1)


def test_fine_tuning_trials_are_runs_of_finetune(sample, sample_encoder, tmp_path, monkeypatch):
    some = sample.subset(np.arange(0, 750, 10))
    settings = dlc.FinetuneConfig(epochs=2, batch_size=16, learning_rate=0.05, linear_probe=True)
    run = dlc.Run(tmp_path / "trials")
    trials = FinetuneTrials(
        sample_encoder,
        some,
        settings,
        image_size=32,
        run=run,
    )
    # none may be left out, since a held-out image is found by its position
    skipping = dlc.Images(some, size=32, on_corrupt="skip")
    assert FinetuneTrials(sample_encoder, skipping, settings).fingerprint == trials.fingerprint
    held_out = np.arange(0, 75, 5)
    fit = np.setdiff1d(np.arange(75), held_out)
    asked = [Trial(fit, 0), Trial(fit[::2], 3)]
    correct = trials(asked, held_out)
    assert trials.earlier_seconds == 0
    for number, trial in enumerate(asked):
        alone = dlc.finetune(
            sample_encoder,
            some,
            trial.positions,
            test=some.subset(held_out),
            image_size=32,
            seed=trial.seed,
            settings=settings,
        )
        np.testing.assert_array_equal(correct[number], alone.predictions == some.labels[held_out])

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("dlc_jax.tuning.trials.train", refuse)
    np.testing.assert_array_equal(trials(asked, held_out), correct)
    assert trials.earlier_seconds == 0  # they are its own
    later = FinetuneTrials(
        sample_encoder,
        some,
        settings,
        image_size=32,
        run=run,
    )
    for _ in range(2):
        np.testing.assert_array_equal(later(asked, held_out), correct)
        known = records.matching(tmp_path / "trials", "trials/*")
        assert len(known) == 2
        assert later.earlier_seconds == pytest.approx(sum(record.seconds for record in known))


def test_one_class_or_equal_scores_or_features_are_defined():
    generator = np.random.default_rng(0)
    labels, features = np.repeat([0, 1], 30), generator.normal(size=(60, 4)).astype(np.float32)
    options = {"keep_fractions": (0.5,), "num_repeats": 5, "trials": FAST, "splits": (0.5,)}
    for found in (
        dlc.tune(np.zeros(60), labels, features=features, **options),
        dlc.tune(np.arange(60.0), labels, features=np.ones((60, 4), np.float32), **options),
        dlc.tune(np.arange(60.0), np.zeros(60, int), features=features, **options),
    ):
        assert found.choice(0.5).method in ("random", "easiest", "hardest", "flexrand", "ccs")
    assert found.full_accuracy == 100  # one class
    assert found.choice(0.5).method == "random"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": None}, r"features=dlc\.features"),
        ({"features": np.ones((60, 4), np.float32)[:-1]}, "one row per label"),
        ({"scores": np.full(60, np.nan)}, "60 are not finite"),
        ({"num_repeats": 1}, "num_repeats"),
        ({"methods": ("entropy",)}, "methods: unknown value 'entropy'"),
        ({"methods": ("easy",)}, "easiest"),
        ({"splits": (1.0,)}, "splits"),
        ({"run": dlc.Run("kept")}, r"run\.folder: expected None, .* got 'kept'"),
        ({"keep_fractions": (30,)}, r"Did you mean 0\.3"),
        ({"keep_fractions": (0.01,)}, r"0\.01 keeps no sample"),
        (
            {"scores": np.zeros(2), "labels": np.arange(2), "features": np.ones((2, 1))},
            "2 samples are too few to hold a fifth out",
        ),
    ],
)
def test_bad_input_is_refused(changes, says):
    arguments = {
        "scores": np.arange(60.0),
        "labels": np.repeat([0, 1], 30),
        "features": np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32),
        "trials": dataclasses.replace(FAST, epochs=1),
        "num_repeats": 2,
    } | changes
    scores, labels = arguments.pop("scores"), arguments.pop("labels")
    with pytest.raises(ValueError, match=says):
        dlc.tune(scores, labels, **arguments)


def test_mistakes_of_kind_are_named():
    """In a process without the run-time checks of annotations."""
    script = """
import numpy as np
import dlc_jax as dlc
labels, features = np.zeros(10, int), np.zeros((10, 2), np.float32)
held_out = dict(val_features=features, val_labels=labels)
heads = lambda **given: dlc.linear_probes(features, labels, [np.arange(5)], **held_out, **given)
select = lambda **given: dlc.select(None, labels, method="random", keep_fraction=0.5, **given)
tune = lambda **given: dlc.tune(np.zeros(10), labels, features=features, **given)
for call, arguments, says in (
    (select, dict(rules={"per_class": False}), "rules: expected dlc.Rules(...), got {'per_cl"),
    (heads, dict(settings={"epochs": 1}), "settings: expected dlc.LinearProbeConfig(...), got {"),
    (tune, dict(trials={"epochs": 1}), "trials: expected dlc.LinearProbeConfig(...), or what tr"),
    (tune, dict(run="runs/mine"), "run: expected dlc.Run(...), got 'runs/mine'"),
):
    try:
        call(**arguments)
    except dlc.InputError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
