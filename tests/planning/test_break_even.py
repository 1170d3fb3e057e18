"""Seconds from speeds, and when pruning has paid for itself."""

import math

import jax
import pytest

from dlc_jax.planning import costs, plan
from dlc_jax.planning.costs import Cost, Speeds
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.plan import paybacks


def test_pruning_is_won_back():
    # 1,000 samples, 0.01 s each in an epoch of training: 10 s; pruning takes 45 s
    low, high = paybacks({0.1: 100, 0.5: 500}, 1000, 20, 45.0, 0.01)
    assert low.saved_seconds == pytest.approx(180)
    assert low.epochs == pytest.approx(5)
    assert low.runs == pytest.approx(0.25)
    assert (high.epochs, high.runs) == (pytest.approx(9), pytest.approx(0.45))
    assert "| 0.10          | 3 min" in plan.payback_table([low, high], 20)


def test_nothing_is_won_back_where_nothing_is_dropped():
    (row,) = paybacks({0.9: 10}, 10, 5, 1.0, 1.0)
    assert math.isinf(row.epochs)
    assert "never" in plan.payback_table([row], 5)


def test_a_processor_decodes_or_computes(monkeypatch):
    cost = Cost("score", "", 1, 100, 1000, 1000, decodes=10, crops=20)
    speeds = Speeds.of(MeshSize(1, 1, 1), 100.0, 0.5, 0.25)
    assert speeds.seconds(cost) == 10 + 10 * 0.5 + 20 * 0.25
    monkeypatch.setattr(costs, "is_processor", lambda: False)
    speeds = Speeds.of(MeshSize(1, 1, 1), 100.0, 0.5, 0.25)
    assert speeds.seconds(cost) == 10  # decoded meanwhile


def test_devices_of_one_processor_share_it(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert Speeds.of(MeshSize(8, 1, 1), 80.0).flops_per_s == 10
    monkeypatch.setattr(costs, "is_processor", lambda: False)
    speeds = Speeds.of(MeshSize(16, 1, 1), 80.0, 1.0)
    assert (speeds.flops_per_s, speeds.decode_seconds) == (80, 0.5)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.123, "0.12 s"), (99.6, "100 s"), (150, "2.5 min"), (3e5, "3.47 days")]
)
def test_times_in_the_unit_that_suits_them(seconds, said):
    assert plan.duration(seconds) == said


@pytest.mark.parametrize(("size", "said"), [(0, "0 B"), (999, "999 B"), (15e12, "15 TB")])
def test_amounts(size, said):
    assert plan.amount(size) == said
