"""Class budgets by size and by difficulty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_samples import VARIANTS, samples_of, select

import dlc_jax as dlc
from dlc_jax.selection.methods import shares


def kept_per_class(scores, labels, keep_fraction, least=0, allocation="nucs"):
    rules = dlc.Rules(allocation=allocation, min_per_class=least)
    kept = dlc.select(scores, labels, method="hardest", keep_fraction=keep_fraction, rules=rules)
    return kept.num_kept_per_class.tolist()


def test_shares_go_by_size_times_difficulty():
    labels = np.repeat([0, 1, 2], [40, 40, 80])
    scores = np.repeat([1.0, 3.0, 1.0], [40, 40, 80])
    # 16 kept in all; weights 40, 120, 80
    assert kept_per_class(scores, labels, keep_fraction=0.1) == [3, 8, 5]  # 2.67, 8, 5.33
    assert kept_per_class(0 * scores, labels, keep_fraction=0.1) == [4, 4, 8]


def test_outliers_do_not_decide():
    labels = np.repeat([0, 1], 100)
    scores = np.ones(200)
    scores[:3] = 1e6  # below the 95th percentile is all 1
    assert kept_per_class(scores, labels, keep_fraction=0.3) == [30, 30]
    generator = np.random.default_rng(0)
    scores = generator.gamma(1.0, size=200)
    means = []
    for label in (0, 1):
        of_class = np.sort(scores[labels == label])
        low, high = np.percentile(of_class, 5), np.percentile(of_class, 95)
        means.append(np.mean([min(max(score, low), high) for score in of_class]))
    first = round(60 * means[0] / sum(means))
    assert kept_per_class(scores, labels, keep_fraction=0.3) == [first, 60 - first]


def test_what_a_class_has_not_goes_to_the_others():
    labels = np.repeat([0, 1, 2], [10, 40, 40])
    scores = np.repeat([100.0, 1.0, 3.0], [10, 40, 40])
    # 9 + 36 + 36 = 81, of which the first two of difficulty 100 and 3 give all they have
    assert kept_per_class(scores, labels, keep_fraction=0.9) == [10, 31, 40]
    scores = np.repeat([100.0, 0.0, 0.0], [10, 40, 40])
    assert kept_per_class(scores, labels, keep_fraction=0.5) == [10, 18, 17]


def test_minimum_and_single_samples_are_kept():
    labels = np.repeat([0, 1, 2], [30, 1, 30])
    scores = np.repeat([0.0, 0.0, 5.0], [30, 1, 30])
    assert kept_per_class(scores, labels, keep_fraction=0.2) == [0, 1, 12]
    assert kept_per_class(scores, labels, keep_fraction=0.2, least=4) == [4, 1, 8]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    keep_fraction=st.floats(0.01, 0.99),
    least=st.integers(0, 35),
)
def test_the_total_is_exact_and_bounds_hold(sizes, seed, keep_fraction, least):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    generator = np.random.default_rng(seed)
    scores = generator.gamma(0.3, size=len(labels)) * generator.integers(0, 9, len(sizes))[labels]
    nucs = np.array(kept_per_class(scores, labels, keep_fraction, least))
    even = kept_per_class(scores, labels, keep_fraction, least, "proportional")
    assert nucs.sum() == sum(even)
    lowest = [1 if size == 1 else min(least, size) for size in sizes]
    assert ((nucs >= lowest) & (nucs <= sizes)).all()


@given(
    bounds=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_shares_inside_the_bounds_are_in_proportion(bounds, share, data):
    least = np.array([low for low, _ in bounds])
    most = np.array([low + more for low, more in bounds])
    weights = np.array(
        data.draw(st.lists(st.floats(0, 10), min_size=len(bounds), max_size=len(bounds)))
    )
    total = int(least.sum() + share * (most - least).sum())
    split = shares(total, weights, least, most)
    assert split.sum() == total
    assert ((split >= least) & (split <= most)).all()
    inside = (split > least + 1) & (split < most - 1) & (weights > 0.1)
    if inside.sum() > 1:
        scale = split[inside] / weights[inside]
        room = 1 / weights[inside]  # rounding moves a share by less than 1
        assert (scale - room).max() <= (scale + room).min() + 1e-9


@pytest.mark.parametrize(("method", "variant"), VARIANTS)
def test_every_method_keeps_what_it_is_allotted(method, variant):
    samples = samples_of(np.repeat([0, 1, 2], [20, 30, 25]))
    samples["scores"] *= np.array([1.0, 2.0, 4.0])[samples["labels"]]
    rules = dlc.Rules(variant, "nucs")
    kept = select(**samples, method=method, keep_fraction=0.4, rules=rules)
    expected = kept_per_class(samples["scores"], samples["labels"], keep_fraction=0.4)
    assert kept.num_kept_per_class.tolist() == expected
    assert expected != [8, 12, 10]
    assert sum(expected) == 30
    assert kept.allocation == "nucs"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scores": np.array([1.0, -0.5, 1, 1])}, r"none below 0, got -0.5 at position 1"),
        ({"scores": None}, "scores: allocation 'nucs'"),
        ({"mode": "official"}, "official"),
        ({"rules": dlc.Rules(allocation="nucs", per_class=False)}, "per_class=False"),
        ({"rules": dlc.Rules(allocation="nuc")}, "proportional, nucs"),
    ],
)
def test_bad_input_is_refused(changes, says):
    arguments = {"scores": np.ones(4), "labels": np.zeros(4, int), "method": "random"}
    arguments |= {"keep_fraction": 0.5, "rules": dlc.Rules(allocation="nucs")} | changes
    with pytest.raises(dlc.InputError, match=says):
        select(**arguments)
