"""What every selector promises."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_samples import BY_CLASS, DRAWN, VARIANTS, samples_of, select

import dlc_jax as dlc
from dlc_jax.selection import INPUTS, SELECTORS, Candidates, id_keys, lots

every_variant = pytest.mark.parametrize(("method", "variant"), VARIANTS)


@pytest.fixture(scope="module")
def samples():
    return samples_of(np.random.default_rng(0).integers(0, 6, 300))


@every_variant
@pytest.mark.parametrize("keep_fraction", [0.1, 0.37, 0.9])
def test_exact_budgets_of_each_class_and_the_same_again(samples, method, variant, keep_fraction):
    choice = {"method": method, "keep_fraction": keep_fraction, "seed": 3}
    choice["rules"] = dlc.Rules(variant=variant)
    kept = select(**samples, **choice)
    assert kept.indices.dtype == np.int64
    assert kept.indices.ndim == 1
    assert np.all(np.diff(kept.indices) > 0)
    expected = [round(size * keep_fraction) for size in np.bincount(samples["labels"])]
    assert np.bincount(samples["labels"][kept.indices], minlength=6).tolist() == expected
    assert kept.num_kept_per_class.tolist() == expected
    assert (kept.variant, kept.allocation, kept.per_class) == (variant, "proportional", True)
    again = select(**samples, **choice)
    np.testing.assert_array_equal(kept.indices, again.indices)


@every_variant
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    keep_fraction=st.floats(0.01, 0.99),
    least=st.integers(0, 40),
)
def test_a_minimum_per_class_is_kept_exactly(method, variant, sizes, keep_fraction, least):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    kept = select(
        **samples_of(labels),
        method=method,
        keep_fraction=keep_fraction,
        rules=dlc.Rules(variant=variant, min_per_class=least),
    )
    expected = [
        1 if size == 1 else max(round(size * keep_fraction), min(least, size)) for size in sizes
    ]
    assert np.bincount(labels[kept.indices], minlength=len(sizes)).tolist() == expected
    assert len(np.unique(kept.indices)) == len(kept)
    assert kept.min_per_class == least


@every_variant
@pytest.mark.parametrize("keep_fraction", [0.07, 0.5, 0.99])
def test_all_samples_as_one_group(samples, method, variant, keep_fraction):
    choice = {"method": method, "keep_fraction": keep_fraction}
    kept = select(**samples, **choice, rules=dlc.Rules(variant=variant, per_class=False))
    assert len(kept) == round(300 * keep_fraction)
    assert len(np.unique(kept.indices)) == len(kept)
    assert not kept.per_class
    assert kept.num_kept_per_class.sum() == len(kept)
    if (variant, SELECTORS[method].needs) != ("deepcore", ("scores",)) and method not in BY_CLASS:
        one_class = samples | {"labels": np.zeros(300, int)}
        of_class = select(**one_class, **choice, rules=dlc.Rules(variant=variant))
        np.testing.assert_array_equal(kept.indices, of_class.indices)


@every_variant
@pytest.mark.parametrize("grouping", [{}, {"per_class": False}, {"allocation": "nucs"}])
def test_the_order_of_samples_does_not_matter(samples, method, variant, grouping):
    if (method, variant) in DRAWN:
        pytest.skip("draws by position")
    order = np.random.default_rng(1).permutation(300)
    permuted = {name: values[order] for name, values in samples.items()}
    rules = dlc.Rules(variant=variant, **grouping)
    choice = {"method": method, "keep_fraction": 0.3, "rules": rules}
    kept, of_permuted = select(**samples, **choice), select(**permuted, **choice)
    np.testing.assert_array_equal(np.sort(order[of_permuted.indices]), kept.indices)


def with_ties(samples, ids):
    """Every sample twice, so that half of them are at a tie; the labels say nothing."""
    doubled = {name: np.concatenate([some, some]) for name, some in samples.items()}
    return doubled | {"ids": ids, "labels": np.tile(doubled["labels"][:300] // 3, 2)}


@every_variant
@pytest.mark.parametrize(
    "grouping", [{}, {"per_class": False}, {"allocation": "nucs"}, {"min_per_class": 40}]
)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_ids_the_order_of_samples_decides_nothing(samples, method, variant, grouping, seed):
    generator = np.random.default_rng(seed)
    ids = np.array([f"a/{i:b}.png" for i in generator.permutation(600)])
    ordered = with_ties(samples, ids)
    order = generator.permutation(600)
    permuted = {name: values[order] for name, values in ordered.items()}
    rules = dlc.Rules(variant=variant, **grouping)
    choice = {"method": method, "keep_fraction": 0.3, "seed": seed, "rules": rules}
    kept, of_permuted = select(**ordered, **choice), select(**permuted, **choice)
    assert set(of_permuted.ids) == set(kept.ids)
    np.testing.assert_array_equal(ids[kept.indices], kept.ids)


def test_a_lot_depends_on_nothing_but_the_id_and_the_draw():
    """The numbers are pinned: they may depend on no machine and no hash seed."""
    keys = id_keys(np.array(["a", "b", "é/\U0001f600.jpg", ""]))
    assert keys.tolist() == [14797246191530490821, 2588574865761517994, 8478107208938115519, 0]
    assert lots(keys, [1, 2, 3]).tolist() == [
        9972613232386065414,
        15018815989695309484,
        548891169562159460,
        11159451626722890781,
    ]
    wide = np.array(["b", "a", "x" * 999])
    assert id_keys(wide)[:2].tolist() == keys[[1, 0]].tolist()
    many = id_keys(np.arange(100_000).astype("U9"))
    assert len(np.unique(many)) == 100_000


def test_draws_by_id_are_even_and_differ_by_seed_and_class():
    labels, ids = np.repeat([0, 1], 40), np.array([f"img_{i:04}.jpg" for i in range(80)])
    scores = np.tile(np.arange(40.0), 2)
    counts, together = np.zeros(80), 0
    candidates = Candidates(scores, labels, ids=ids)
    for seed in range(400):
        kept = candidates.select(keep_fraction=0.3, split=0.5, seed=seed)
        counts[kept.indices] += 1
        together += len(np.intersect1d(kept.indices[:12], kept.indices[12:] - 40))
    # 6 of 20 in each pool: 120 of 400 draws, standard deviation 9.2
    assert np.all(np.abs(counts - 120) < 4.5 * 9.2)
    # 3.6 of the 12 of a class are at the same place in the other; standard deviation 0.08
    assert abs(together / 400 - 3.6) < 0.4


def test_a_sample_more_changes_no_other_lot():
    ids = np.array([f"{i}" for i in range(200)])
    choice = {"method": "random", "keep_fraction": 0.5, "seed": 4}
    kept = set(dlc.select(None, np.zeros(200, int), ids=ids, **choice).ids)
    fewer = set(dlc.select(None, np.zeros(198, int), ids=ids[2:], **choice).ids)
    assert len(kept ^ fewer) <= 3


def test_official_draws_follow_positions_also_with_ids(samples):
    ids = np.array([f"{i:b}" for i in range(300)])
    for method in ("flexrand", "random", "easiest"):
        choice = {"method": method, "keep_fraction": 0.3, "mode": "official", "seed": 2}
        kept = dlc.select(samples["scores"], samples["labels"], **choice)
        named = dlc.select(samples["scores"], samples["labels"], ids=ids, **choice)
        np.testing.assert_array_equal(kept.indices, named.indices)


def test_repeated_ids_are_refused():
    with pytest.raises(dlc.InputError, match=r"^ids: 1 occur more than once, first a"):
        dlc.select(np.zeros(3), np.zeros(3, int), ids=np.array(["a", "b", "a"]), keep_fraction=0.5)


@every_variant
def test_compiled_equals_eager(method, variant):
    samples = samples_of(np.repeat([0, 1], 20))
    choice = {"method": method, "keep_fraction": 0.4, "rules": dlc.Rules(variant=variant)}
    compiled = select(**samples, **choice)
    with jax.disable_jit():
        eager = select(**samples, **choice)
    np.testing.assert_array_equal(compiled.indices, eager.indices)


@every_variant
def test_it_uses_what_it_needs_and_nothing_else(samples, method, variant):
    needs = SELECTORS[method].needs
    choice = {"method": method, "keep_fraction": 0.3, "rules": dlc.Rules(variant=variant)}
    kept = select(**samples, **choice)
    used = (*needs, *SELECTORS[method].takes)
    bare = {"scores": None, "labels": samples["labels"]} | {name: samples[name] for name in used}
    for name in used:
        others = select(**samples | {name: samples[name][::-1]}, **choice)
        assert set(others.indices) != set(kept.indices)
    for name in needs:
        with pytest.raises(dlc.InputError, match=rf"^{name}: method '{method}'"):
            select(**bare | {name: None}, **choice)
    for name in SELECTORS[method].takes:
        assert len(select(**bare | {name: None}, **choice)) == len(kept)
    np.testing.assert_array_equal(select(**bare, **choice).indices, kept.indices)


@every_variant
def test_a_class_of_one_sample_keeps_it_and_is_listed(method, variant):
    samples = samples_of([0, 0, 1, 0, 0])
    kept = select(**samples, method=method, keep_fraction=0.1, rules=dlc.Rules(variant=variant))
    assert kept.indices.tolist() == [2]
    assert kept.single_sample_classes == (1,)
    together = {"method": method, "rules": dlc.Rules(variant=variant, per_class=False)}
    assert len(select(**samples, **together, keep_fraction=0.1)) == 0
    assert len(select(**samples, **together, keep_fraction=0.9)) == 4


@every_variant
@pytest.mark.parametrize("keep_fraction", [0.2, 0.55, 0.95])
def test_samples_that_are_all_the_same(method, variant, keep_fraction):
    same = samples_of(np.zeros(50, int), num_features=33)
    for name in ("scores", *INPUTS):
        same[name][:] = same[name][0]
    rules = dlc.Rules(variant=variant)
    kept = select(**same, method=method, keep_fraction=keep_fraction, rules=rules)
    num = round(50 * keep_fraction)
    assert len(np.unique(kept.indices)) == num
    if method == "middle":
        np.testing.assert_array_equal(kept.indices, np.arange((50 - num) // 2, (50 + num) // 2))
    elif (method, variant) not in (
        *DRAWN,
        ("d2", "published"),
    ):  # which sends messages to the first
        first = SELECTORS[method].needs != ("scores",) or method == "easiest"
        first |= "scores" in SELECTORS[method].needs and variant == "paper"
        expected = np.arange(num) if first else np.arange(50 - num, 50)
        np.testing.assert_array_equal(kept.indices, expected)


def test_the_slip_keeps_the_least_uncertain_of_all_samples(samples):
    of_all, slipped = dlc.Rules(per_class=False), dlc.Rules("deepcore", per_class=False)
    for method in ("least_confidence", "entropy", "margin"):
        choice = {"method": method, "keep_fraction": 0.2}
        slip = select(**samples, **choice, rules=slipped)
        right = select(**samples, **choice, rules=of_all)
        ranked = np.argsort(samples["scores"])
        np.testing.assert_array_equal(slip.indices, np.sort(ranked[:60]))
        np.testing.assert_array_equal(right.indices, np.sort(ranked[-60:]))
        per_class = [
            select(**samples, **choice, rules=dlc.Rules(variant=name)).indices
            for name in ("published", "deepcore")
        ]
        np.testing.assert_array_equal(*per_class)
        for rules in (dlc.Rules("paper"), dlc.Rules("paper", per_class=False)):
            least = select(
                **samples,
                method="easiest",
                keep_fraction=0.2,
                rules=dlc.Rules(per_class=rules.per_class),
            )
            as_run = select(**samples, **choice, rules=rules)
            np.testing.assert_array_equal(as_run.indices, least.indices)


@every_variant
def test_candidates_give_what_select_gives_whatever_was_picked_before(samples, method, variant):
    cells = [
        ({"keep_fraction": keep, "seed": seed}, {"per_class": per_class, "min_per_class": least})
        for keep in (0.1, 0.6)
        for seed in (0, 1)
        for per_class, least in ((True, 0), (True, 9), (False, 0))
    ]
    rows = {name: samples[name] for name in INPUTS}
    candidates = Candidates(samples["scores"], samples["labels"], inputs=rows)
    others = [other for other in ("random", "hardest", "ccs") if other != method]
    for cell, grouping in np.random.default_rng(0).permutation(cells):
        for other in others:
            candidates.select(method=other, **cell, rules=dlc.Rules(**grouping))
        rules = dlc.Rules(variant=variant, **grouping)
        picked = candidates.select(method=method, **cell, rules=rules)
        alone = select(**samples, method=method, **cell, rules=rules)
        np.testing.assert_array_equal(picked.indices, alone.indices)
        np.testing.assert_array_equal(picked.num_kept_per_class, alone.num_kept_per_class)


def test_candidates_in_the_released_order_and_in_ours_do_not_mix():
    labels = np.repeat([0, 1], 400).astype(np.int32)
    scores = np.random.default_rng(1).integers(0, 5, 800).astype(np.float32)  # ties
    candidates = Candidates(scores, labels)
    for split in (0.3, 0.8):
        for mode in ("official", "default", "official"):
            cell = {"keep_fraction": 0.4, "split": split, "mode": mode, "seed": 2}
            picked, alone = candidates.select(**cell), dlc.select(scores, labels, **cell)
            np.testing.assert_array_equal(picked.indices, alone.indices)


def test_candidates_are_sorted_once_for_all_cells_of_a_seed(samples, monkeypatch):
    sorts = []
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *a, **k: sorts.append(1) or argsort(*a, **k))
    monkeypatch.setattr(np, "sort", None)
    candidates = Candidates(samples["scores"], samples["labels"])
    for keep in (0.1, 0.5, 0.9):
        for split in (0.2, 0.5, 0.7):
            candidates.select(keep_fraction=keep, split=split)
    # by class; and in each of the six classes by score, and back to where samples lie
    assert len(sorts) == 1 + 6 * 2


def test_scores_that_differ_a_little_keep_nearly_the_same_samples():
    """Lots go with samples, not with ranks: only what changes its pool changes."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500).astype(np.int32)
    scores = generator.normal(size=1000)
    others = scores.copy()
    ranked = np.argsort(scores[:500])
    inside, across = ranked[[100, 101]], ranked[[249, 250]]
    others[inside] = scores[inside[::-1]]  # two of one pool change places
    for method in ("flexrand", "ccs"):
        kept, again = (
            dlc.select(some, labels, method=method, keep_fraction=0.3, seed=3).indices
            for some in (scores, others)
        )
        np.testing.assert_array_equal(kept, again)
    others[across] = scores[across[::-1]]  # and two change pools
    kept, again = (
        set(dlc.select(some, labels, keep_fraction=0.3, seed=3).indices.tolist())
        for some in (scores, others)
    )
    assert len(kept ^ again) <= 4
