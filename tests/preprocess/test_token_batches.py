"""Rows that samples share: all of them once, in few shapes, with little padding."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlc_jax.preprocess.token_batches import (
    bucket_length,
    make_rows,
    padding,
    placed,
    plan_batches,
)
from dlc_jax.preprocess.tokens import Tokenised


def numbered(lengths):
    """Samples whose tokens count up from 1, of which the first is the prompt's."""
    rows = tuple(np.arange(length, dtype=np.int32) + 1 for length in lengths)
    ones = np.ones(len(rows), np.int32)
    return Tokenised(rows, ones, np.zeros(len(rows), bool), np.arange(len(rows)).astype(np.str_))


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    budget=st.integers(1, 2000),
)
def test_batches_hold_every_sample_once_in_six_shapes_at_most(lengths, budget):
    data, seen = numbered(lengths), []
    plans = plan_batches(data, budget)
    for plan in plans:
        tokens, segments = make_rows(data, *plan)
        assert tokens.shape == segments.shape == (plan.num_rows, plan.length)
        assert plan.num_rows == 1 or tokens.size <= budget
        num_tokens = 0
        for row, number, where, position in placed(data, plan.rows):
            np.testing.assert_array_equal(tokens[row, where], data.tokens[position])
            assert (segments[row] == number).sum() == lengths[position]
            assert (segments[row, where] == number).all()
            num_tokens += lengths[position]
            seen.append(position)
        assert (segments > 0).sum() == (tokens > 0).sum() == num_tokens
        assert [place.position for place in placed(data, plan.rows)] == plan.positions
    assert sorted(seen) == list(range(len(lengths)))
    assert len({(plan.num_rows, plan.length) for plan in plans}) <= 6
    assert sorted(plans, key=lambda plan: plan.length) == plans


@pytest.mark.parametrize("limit", [256, 512, 1024, 2048])
@pytest.mark.parametrize("median", [60, 170, 400])
@pytest.mark.parametrize("num", [200, 400, 5000])
def test_less_than_a_tenth_is_padding(num, median, limit):
    """For lengths as instructions have them, cut at a limit; each alone would be a fifth."""
    generator = np.random.default_rng(0)
    for spread in (0.3, 0.6, 0.9):
        lengths = np.exp(generator.normal(np.log(median), spread, num)).astype(int)
        data = numbered(np.clip(lengths, 20, limit))
        assert padding(data, plan_batches(data, 8192)) < 0.1


def test_rows_of_very_different_lengths_are_laid_out_fast():
    lengths = np.random.default_rng(0).integers(2, 2048, 50_000)
    data = numbered(lengths)
    start = time.process_time()
    assert padding(data, plan_batches(data, 8192)) < 0.03
    assert time.process_time() - start < 5


@given(length=st.integers(1, 2048), more=st.integers(0, 2048))
def test_buckets_fit(length, more):
    longest = length + more
    bucket = bucket_length(length, longest)
    assert length <= bucket <= min(longest, max(2 * length, 32))
    assert bucket_length(bucket, longest) == bucket
