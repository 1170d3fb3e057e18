"""Arrays that no selector can go by, and choices that do not go together."""

import numpy as np
import pytest
from known_samples import samples_of, select

import dlc_jax as dlc


def changed(name, place, value):
    values = samples_of([0, 0, 1, 1])[name]
    values[place] = value
    return {name: values}


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("herding", {"features": None}, r"'herding' needs them; see dlc\.features\(\.\.\.\)"),
        ("moderate", {"features": None}, r"features: .*dlc\.features"),
        ("contextual_diversity", {"probabilities": None}, r"dlc\.record_training\(\.\.\.\)"),
        ("entropy", {"scores": None}, r"scores: .*'entropy' of dlc\.record_training"),
        ("flexrand", {"scores": None}, r"scores: .*dlc\.score"),
        ("herding", changed("features", (2, 1), np.nan), "features: 1 rows .* position 2"),
        ("herding", changed("features", (0, 1), np.inf), "features: 1 rows .* position 0"),
        ("k_center_greedy", {"features": np.zeros((3, 2))}, r"features: .*\(3, 2\)"),
        ("k_center_greedy", {"features": np.zeros(4)}, r"features: expected \[n, d\]"),
        ("moderate", {"features": np.zeros((4, 0))}, "features"),
        ("moderate", {"features": np.zeros((4, 2), int)}, "floating"),
        ("contextual_diversity", changed("probabilities", 1, 0.5), "position 1: 3.5"),
        ("contextual_diversity", changed("probabilities", 3, np.nan), "position 3"),
        ("contextual_diversity", {"probabilities": np.array([[1.5, -0.5]] * 4)}, "below 0"),
        ("random", changed("scores", 2, np.nan), "scores: 1 are not finite, first at position 2"),
        ("random", {"scores": None, "labels": np.array([], int)}, "no sample"),
        ("random", {"scores": None, "labels": np.array([0.5, 1])}, "non-negative integers"),
        ("herding", {"scores": None, "labels": np.zeros((4, 1), int)}, r"labels: .*\(4, 1\)"),
        ("herding", {"rules": dlc.Rules("deepcor")}, "published, deepcore"),
        (
            "random",
            {"rules": dlc.Rules("deepcore")},
            "variant of method 'random': .*valid: published",
        ),
        ("herding", {"split": 0.5}, "takes none"),
        ("random", {"rules": dlc.Rules(per_class=False, min_per_class=1)}, "per_class=False"),
        ("easiest", {"rules": dlc.Rules(per_class=False), "mode": "official"}, "official"),
        ("flexrand", {"split": np.nan, "mode": "official"}, "0.95 only, got nan"),
    ],
)
def test_it_is_refused(method, changes, says):
    arguments = samples_of([0, 0, 1, 1]) | {"keep_fraction": 0.5} | changes
    with pytest.raises(dlc.InputError, match=says):
        select(**arguments, method=method)


def test_probabilities_may_be_off_by_rounding():
    samples = samples_of([0, 0, 1, 1])
    samples["probabilities"] *= 1.0005
    assert len(select(**samples, method="contextual_diversity", keep_fraction=0.5)) == 2
