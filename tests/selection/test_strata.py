"""Coverage-centric selection."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.selection.methods import even_budgets


def plain_ccs_counts(scores, num):
    """The stratum of each sample (-1: dropped) and how many to take of each, by loops."""
    n = len(scores)
    ranked = sorted(range(n), key=lambda i: (scores[i], i))
    rest = ranked[: n - min(n // 10, n - num)]
    low, high = scores[rest[0]], scores[rest[-1]]
    stratum = np.full(n, -1)
    for i in rest:
        k = 0
        while k < 49 and scores[i] >= low + (k + 1) * (high - low) / 50 and high > low:
            k += 1
        stratum[i] = k
    left = {k: int((stratum == k).sum()) for k in range(50)}
    take = {}
    while left:
        k = min(left, key=lambda key: (left[key], key))
        take[k] = min(left[k], num // len(left))
        num -= take[k]
        del left[k]
    assert num == 0
    return stratum, [take[k] for k in range(50)]


@settings(deadline=None)
@given(seed=st.integers(0, 50), num=st.integers(1, 120), share=st.floats(0.02, 0.98))
def test_strata_and_their_budgets_equal_plain_loops(seed, num, share):
    generator = np.random.default_rng(seed)
    scores = generator.gamma(1.0, size=num)
    labels, of_all = np.zeros(num, int), dlc.Rules(per_class=False)
    kept = dlc.select(scores, labels, method="ccs", keep_fraction=share, rules=of_all).indices
    assert len(kept) == round(num * share)
    stratum, expected = plain_ccs_counts(scores, len(kept))
    assert (stratum[kept] >= 0).all()
    np.testing.assert_array_equal(np.bincount(stratum[kept], minlength=50), expected)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=50), share=st.floats(0, 1))
def test_even_budgets_are_exact_and_fit(sizes, share):
    total = int(sum(sizes) * share)
    budgets = np.array(even_budgets(np.array(sizes), total))
    assert budgets.sum() == total
    assert ((budgets >= 0) & (budgets <= sizes)).all()


def test_the_hardest_tenth_goes_unless_the_budget_needs_it():
    scores, labels = np.arange(100.0), np.zeros(100, int)
    for keep_fraction, dropped in ((0.5, 10), (0.9, 10), (0.95, 5), (0.99, 1)):
        kept = dlc.select(scores, labels, method="ccs", keep_fraction=keep_fraction).indices
        assert kept.max() < 100 - dropped
        assert len(kept) == round(100 * keep_fraction)


def test_strata_are_drawn_from_by_the_seed_alone():
    scores = np.linspace(0, 1, 200)
    labels = np.zeros(200, int)
    first, again, other = (
        dlc.select(scores, labels, method="ccs", keep_fraction=0.3, seed=seed).indices
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
