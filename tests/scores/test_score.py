import numpy as np
import pytest

import dlc_jax as dlc


def test_dlc_is_the_mean_over_probes_of_own_losses():
    losses = np.random.default_rng(0).normal(2.7, 0.02, (50, 9)).astype(np.float32)
    scores = dlc.score(losses)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, losses.astype(np.float64).mean(0).astype(np.float32))


def test_scores_of_probes_are_scores_of_their_losses():
    losses = np.arange(6, dtype=np.float32).reshape(2, 3)
    probes = dlc.ProbeLosses(
        losses=losses,
        sparsity=np.zeros(2, np.float32),
        labels=np.zeros(3, np.int32),
        ids=np.array(["a", "b", "c"]),
        prototypes=np.zeros((1, 1), np.float32),
        class_names=("x",),
    )
    np.testing.assert_array_equal(dlc.score(probes), [1.5, 2.5, 3.5])


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match=r"matrix \[m, n\]"):
        dlc.score(np.zeros(3))
    with pytest.raises(ValueError, match="sample 1 at probe 0"):
        dlc.score(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="dlc"):
        dlc.score(np.zeros((2, 2)), method="el2n")
