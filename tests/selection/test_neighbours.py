"""Selections by neighbours and prototypes against plain NumPy, and where they are defined."""

import dataclasses

import numpy as np
import pytest
from known_samples import samples_of, select

import dlc_jax as dlc
from dlc_jax.selection.neighbours import _neighbours_for_coverage, nearest

# every plain version takes (samples by name, positions of the group, how many, keep fraction)


def pairwise(rows, others):
    return np.linalg.norm(rows[:, None] - others[None], axis=2)


def rows_of(samples, group, name="features"):
    return samples[name][group].astype(np.float64)


def plain_typical(samples, group, num, keep_fraction):
    rows = rows_of(samples, group)
    distance = pairwise(rows, rows)
    first = [int(np.argmin(np.linalg.norm(rows - rows.mean(axis=0), axis=1)))]
    while len(first) < min(num, 500):
        first.append(int(np.argmax(distance[:, first].min(axis=1))))
    centres = rows[sorted(first)].copy()
    for _ in range(20):
        cluster = pairwise(rows, centres).argmin(axis=1)
        for k in range(len(centres)):
            if (cluster == k).any():
                centres[k] = rows[cluster == k].mean(axis=0)
    queues = []
    for k in range(len(centres)):
        members = np.flatnonzero(cluster == k)
        near = min(20, max(len(members) // 2, 1))
        within = np.sort(distance[np.ix_(members, members)], axis=1)[:, 1 : near + 1]
        if len(members):
            far = within.mean(axis=1) if within.size else np.zeros(1)
            queues.append(members[np.argsort(far, kind="stable")].tolist())
    chosen = []
    for is_small in (False, True):
        turns = [q for q in sorted(queues, key=len, reverse=True) if (len(q) <= 5) == is_small]
        turns = [list(q) for q in turns]
        while any(turns):
            chosen += [q.pop(0) for q in turns if q]
    return chosen[:num]


def plain_subzerocore(samples, group, num, keep_fraction):
    rows = rows_of(samples, group)
    cosine = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    size, missed, k = len(rows), 1.0, 0
    while 1 - missed < 0.6 and k < size - num - 1:
        k += 1
        missed = missed * (size - num - k) / (size - k)
    radius = np.sort(1 - cosine + np.diag(np.full(size, np.inf)), axis=1)[:, max(k, 1) - 1]
    weight = np.exp(-((radius - radius.mean()) ** 2) / (2 * radius.var()))
    weighted, chosen = cosine * weight, []
    for _ in range(num):
        covered = weighted[:, chosen].max(axis=1) if chosen else np.full(size, -1.0)
        gain = np.round(np.maximum(weighted - covered[:, None], 0).sum(axis=0), 8)
        free = [j for j in range(size) if j not in chosen]
        chosen.append(max(free, key=lambda j: (gain[j], weight[j], -j)))
    return chosen


def plain_d2(samples, group, num, keep_fraction):
    rows, score = rows_of(samples, group), samples["scores"][group]
    distance = pairwise(rows, rows) + np.diag(np.full(len(rows), np.inf))
    k = min(10, len(rows) - 1)
    near = np.argsort(distance, axis=1, kind="stable")[:, :k]
    unit = np.take_along_axis(distance, near, axis=1).mean()
    linked = np.zeros((len(rows), len(rows)), bool)
    np.put_along_axis(linked, near, True, axis=1)
    strength = np.where(linked | linked.T, np.exp(-((distance / unit) ** 2)), 0)
    score = (score - score.min()) / (score.max() - score.min())
    value, chosen = score + strength @ score, []
    for _ in range(num):
        chosen.append(int(np.argmax(value)))
        value = value - strength[:, chosen[-1]] * value[chosen[-1]]
        value[chosen] = -np.inf
    return chosen


def class_means(samples, name):
    labels = samples["labels"]
    return np.stack(
        [samples[name][labels == j].mean(axis=0, dtype=float) for j in np.unique(labels)]
    )


def own_and_other(samples, group, name):
    distance = pairwise(rows_of(samples, group, name), class_means(samples, name))
    is_own = samples["labels"][group][:, None] == np.unique(samples["labels"])
    return distance[is_own], np.where(is_own, np.inf, distance).min(axis=1)


def plain_prototypes(samples, group, num, keep_fraction):
    own, other = own_and_other(samples, group, "features")
    return np.argsort(own / other, kind="stable")[:num]


def plain_ram_apl(samples, group, num, keep_fraction):
    ranks, missed = [], []
    for name in ("features", "second_features"):
        own, other = own_and_other(samples, group, name)
        ranks.append(np.argsort(np.argsort(own)))
        missed.append(other < own)
    weight = 0.2 + 0.8 / (1 + np.exp(keep_fraction - 0.5))
    penalty = weight * np.mean(ranks, axis=0) / len(group)
    return np.argsort(penalty + (1 - weight) * np.mean(missed, axis=0), kind="stable")[:num]


def plain_herding(rows, num):
    mean, chosen = rows.mean(axis=0), []
    for _ in range(num):
        free = [i for i in range(len(rows)) if i not in chosen]
        errors = [np.linalg.norm(rows[[*chosen, i]].mean(axis=0) - mean) for i in free]
        chosen.append(free[int(np.argmin(errors))])
    return chosen


def plain_ccs_herding(samples, group, num, keep_fraction):
    score = samples["scores"][group]
    order = np.argsort(score, kind="stable")
    order = order[: len(order) - min(len(order) // 10, len(order) - num)]
    edges = np.linspace(score[order].min(), score[order].max(), 51)
    stratum = np.clip(np.searchsorted(edges, score[order], side="right") - 1, 0, 49)
    sizes, left, chosen = np.bincount(stratum, minlength=50), num, []
    for done, k in enumerate(np.argsort(sizes, kind="stable")):
        share = min(sizes[k], left // (50 - done))
        left -= share
        part = order[stratum == k]
        chosen += (
            part[plain_herding(rows_of(samples, group[part]), share)].tolist() if share else []
        )
    return chosen


def plain_middle(samples, group, num, keep_fraction):
    skipped = (len(group) - num) // 2
    return np.argsort(samples["scores"][group])[skipped : skipped + num]


PLAIN = {
    "typical": plain_typical,
    "subzerocore": plain_subzerocore,
    "d2": plain_d2,
    "prototypes": plain_prototypes,
    "ram_apl": plain_ram_apl,
    "ccs_herding": plain_ccs_herding,
    "middle": plain_middle,
}


@pytest.fixture(scope="module")
def real(sample, sample_encoder):
    """The bundled sample; the second encoder sees it at half the size."""
    return {
        "labels": sample.labels,
        "scores": dlc.score(dlc.probe(sample_encoder, sample, image_size=64, path=FEW)),
        "features": dlc.features(sample_encoder, sample, image_size=64),
        "second_features": dlc.features(sample_encoder, sample, image_size=32),
    }


FEW = dlc.PathSpec(num_probes=2)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("data", ["random", "real"])
def test_identical_to_plain_numpy(request, method, per_class, data):
    if data == "real":
        samples = request.getfixturevalue("real")
        if not per_class or method == "typical":
            few = np.arange(0, len(samples["labels"]), 5)
            samples = {name: values[few] for name, values in samples.items()}
    else:
        samples = samples_of(np.random.default_rng(2).integers(0, 3, 130), num_features=24)
    labels = samples["labels"]
    groups = [np.flatnonzero(labels == j) for j in np.unique(labels)]
    if not per_class:
        groups = [np.arange(len(labels))]
    for keep_fraction in (0.1, 0.4, 0.8):
        expected = [
            group[PLAIN[method](samples, group, round(len(group) * keep_fraction), keep_fraction)]
            for group in groups
        ]
        rules = dlc.Rules(per_class=per_class)
        kept = select(**samples, method=method, keep_fraction=keep_fraction, rules=rules)
        np.testing.assert_array_equal(kept.indices, np.sort(np.concatenate(expected)))


@pytest.mark.parametrize("method", [name for name in PLAIN if name != "middle"])
@pytest.mark.parametrize("scale", [1e-170, 1e-25, 1e25, 1e160])
def test_the_scale_of_features_does_not_matter(method, scale):
    samples = samples_of(np.repeat([0, 1], 30))
    samples |= {name: samples[name].astype(float) for name in ("features", "second_features")}
    scaled = samples | {name: samples[name] * scale for name in ("features", "second_features")}
    choice = {"method": method, "keep_fraction": 0.4}
    np.testing.assert_array_equal(
        select(**scaled, **choice).indices, select(**samples, **choice).indices
    )


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("keep_fraction", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_equal_points_and_classes_of_few_are_defined(method, keep_fraction, value):
    labels = np.repeat([0, 1, 2, 5], [1, 2, 3, 30])
    samples = samples_of(labels)
    for name in ("features", "second_features"):
        samples[name][:] = value
    kept = select(**samples, method=method, keep_fraction=keep_fraction)
    expected = [1, *(round(n * keep_fraction) for n in (2, 3, 30))]
    assert np.bincount(labels[kept.indices], minlength=6)[[0, 1, 2, 5]].tolist() == expected


def test_a_single_class_is_told_from_no_other():
    """Distances to the class mean alone decide then."""
    samples = samples_of(np.zeros(40, int))
    rows = rows_of(samples, np.arange(40))
    nearest_first = np.argsort(np.linalg.norm(rows - rows.mean(axis=0), axis=1))
    kept = select(**samples, method="prototypes", keep_fraction=0.25)
    np.testing.assert_array_equal(kept.indices, np.sort(nearest_first[:10]))
    del samples["second_features"]
    kept = select(**samples, method="ram_apl", keep_fraction=0.25)
    np.testing.assert_array_equal(kept.indices, np.sort(nearest_first[:10]))


def test_more_samples_than_similarities_are_kept_for(monkeypatch):
    samples = samples_of(np.zeros(90, int))
    choice = {"method": "subzerocore", "keep_fraction": 0.5}
    kept = select(**samples, **choice)
    monkeypatch.setattr("dlc_jax.selection.neighbours._WHOLE", 10)
    np.testing.assert_array_equal(select(**samples, **choice).indices, kept.indices)


@pytest.mark.parametrize("block", [7, 512])
def test_neighbours_are_the_nearest_and_ties_in_order(monkeypatch, block):
    monkeypatch.setattr("dlc_jax.selection.neighbours._BLOCK", block)
    rows = np.random.default_rng(0).integers(0, 3, (40, 2)).astype(np.float64)  # many copies
    found = nearest(rows, 6)
    distance = pairwise(rows, rows) + np.diag(np.full(40, np.inf))
    expected = np.argsort(distance, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(found.places, expected)
    np.testing.assert_allclose(found.distances, np.take_along_axis(distance, expected, axis=1))
    assert nearest(rows[:1], 6).places.shape == (1, 0)
    assert nearest(rows[:4], 6).places.shape == (4, 3)


@pytest.mark.parametrize(("num_samples", "num", "k"), [(500, 112, 4), (100, 10, 9), (10, 9, 1)])
def test_as_many_neighbours_as_cover(num_samples, num, k):
    """The first is an example of others; of the last, one neighbour is always kept."""
    assert _neighbours_for_coverage(num_samples, num) == k
    if k > 1:
        generator, hits = np.random.default_rng(0), []
        for near in (k - 1, k):
            draws = [
                np.min(generator.choice(num_samples - 1, num, replace=False)) for _ in range(4000)
            ]
            hits.append(np.mean(np.array(draws) < near))
        assert hits[0] < 0.6 + 0.02
        assert hits[1] > 0.6 - 0.02


@pytest.mark.parametrize("method", ["typical", "d2", "prototypes", "ram_apl"])
def test_one_far_sample_does_not_hide_the_others(method):
    """Distances that are small beside its own keep their digits."""
    samples = samples_of(np.repeat([0, 1], 40), num_features=6)
    expected = plain_of(samples, method)
    for name in ("features", "second_features"):
        samples[name][5] *= 1e5
    far = plain_of(samples, method)
    kept = select(**samples, method=method, keep_fraction=0.4).indices
    np.testing.assert_array_equal(kept, far)
    assert len(np.intersect1d(kept, expected)) >= 16  # of 32; by position it would be fewer


def plain_of(samples, method):
    groups = [np.flatnonzero(samples["labels"] == j) for j in (0, 1)]
    return np.sort(np.concatenate([g[PLAIN[method](samples, g, 16, 0.4)] for g in groups]))


def test_what_auto_stands_for_uses_what_was_tuned():
    """A second encoder had no part in it."""
    samples = samples_of(np.repeat([0, 1, 2], 30))
    trials = dlc.LinearProbeConfig(epochs=2)
    given = {name: samples[name] for name in ("scores", "labels")}
    tuning = dlc.tune(
        **given, features=samples["features"], trials=trials, methods=("ram_apl",), num_repeats=5
    )
    choice = tuning.choice(0.5)._replace(method="ram_apl", split=None)
    tuning = dataclasses.replace(tuning, methods=(choice,))
    cell = {"method": "auto", "keep_fraction": 0.5, "tuning": tuning}
    expected = select(**given, features=samples["features"], **cell)
    kept = select(
        **given, features=samples["features"], second_features=samples["second_features"], **cell
    )
    np.testing.assert_array_equal(kept.indices, expected.indices)
