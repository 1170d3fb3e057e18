import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlc_jax.preprocess.decode import in_order


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_results_come_in_order_whatever_takes_how_long(num, num_ahead):
    def compute(number: int) -> int:
        time.sleep((number * 7919 % 5) / 5000)
        return number**2

    assert list(in_order(compute, num, num_ahead=num_ahead)) == [i**2 for i in range(num)]


def test_no_more_than_asked_for_are_ahead_and_work_goes_on_meanwhile():
    begun: list[int] = []
    results = in_order(lambda number: begun.append(number) or number, 100, num_ahead=3)
    assert begun == []  # nothing before somebody asks
    for number in range(5):
        assert next(results) == number
        deadline = time.monotonic() + 10
        while len(begun) < number + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(begun) == list(range(number + 4))
    results.close()


def test_an_error_comes_at_its_turn_and_what_follows_is_dropped():
    begun: list[int] = []

    def compute(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise OSError("number 2")
        return number

    results = in_order(compute, 1000, num_ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="number 2"):
        next(results)
    assert len(begun) <= 7
    assert not [thread for thread in threading.enumerate() if "in_order" in thread.name]


def test_whoever_stops_taking_leaves_no_thread_behind():
    results = in_order(lambda number: number, 1000)
    assert next(results) == 0
    results.close()
    assert not [thread for thread in threading.enumerate() if "in_order" in thread.name]
