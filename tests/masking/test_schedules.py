import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlc_jax.masking import PathSpec


def test_linear_takes_equal_steps_of_all_weights_to_98_percent():
    counts = PathSpec("linear").counts(11_166_912).chosen
    assert counts.tolist() == [round(0.02 * k * 11_166_912) for k in range(50)]
    assert counts[-1] / 11_166_912 == pytest.approx(0.98)


def test_geometric_takes_equal_shares_of_the_rest_to_63_percent():
    counts = PathSpec(schedule="geometric").counts(11_166_912).chosen
    assert counts[1] == round(0.02 * 11_166_912)
    assert counts[2] == counts[1] + round(0.02 * (11_166_912 - counts[1]))
    assert counts[-1] / 11_166_912 == pytest.approx(1 - 0.98**49, abs=1e-6)


def test_midpoints_stand_for_the_whole_path():
    grid = PathSpec("linear").counts(100_000).chosen
    for num in (1, 4, 5, 8, 50):
        counts = PathSpec("linear", num_probes=num, placement="midpoint").counts(100_000).chosen
        expected = grid[[int((j + 0.5) * 50 / num) for j in range(num)]]
        np.testing.assert_array_equal(counts, expected)


def test_max_sparsity_cuts_the_path():
    counts = PathSpec("linear", max_sparsity=0.5).counts(1000).chosen
    assert counts.tolist() == list(range(0, 501, 20))
    middle = (
        PathSpec("linear", max_sparsity=0.5, num_probes=2, placement="midpoint").counts(1000).chosen
    )
    assert middle.tolist() == [counts[6], counts[19]]


@given(
    num_weights=st.integers(1000, 10**8),
    step=st.floats(0.005, 0.3),
    num=st.integers(1, 200),
    schedule=st.sampled_from(["linear", "geometric"]),
    placement=st.sampled_from(["grid", "midpoint"]),
)
def test_counts_ascend_and_never_reach_all_weights(num_weights, step, num, schedule, placement):
    if schedule == "linear" and num * step > 1:
        num = int(1 / step)
    path = PathSpec(schedule=schedule, step=step, num_probes=num, placement=placement)
    counts = path.counts(num_weights).chosen
    assert 1 <= len(counts) <= num
    assert np.all(np.diff(counts) >= 0)
    assert counts[0] >= 0
    assert counts[-1] < num_weights


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "cubic"}, "linear, geometric"),
        ({"placement": "ends"}, "grid, midpoint"),
        ({"step": 0}, "probe.step"),
        ({"step": 1}, "probe.step"),
        ({"num_probes": 0}, "probe.num_probes"),
        ({"num_probes": 51}, "full sparsity"),
        ({"max_sparsity": 1.1}, "probe.max_sparsity"),
        ({"max_sparsity": float("nan")}, "probe.max_sparsity"),
    ],
)
def test_bad_paths_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        PathSpec(**changes).for_mode("default").counts(1000)
