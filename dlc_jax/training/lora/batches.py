"""The rows that a step is fed: one sample each, or packed, in few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dlc_jax.preprocess.tokens import Tokenised, bucket_length


class TokenRows(NamedTuple):
    """What a program call is fed.

    Attributes:
      tokens: Ids; 0 where there is none.
      segments: Number of the sample within its row, from 1; 0 at padding.
      counts: Whether the loss counts the token: it is of a response, and something is before it.
    """

    tokens: Int32[np.ndarray, "b t"]
    segments: Int32[np.ndarray, "b t"]
    counts: Bool[np.ndarray, "b t"]


def rows_of_step(
    data: Tokenised,
    positions: Int64[np.ndarray, " k"],
    rows_at_once: int,
    max_length: int,
    *,
    packing: bool,
) -> Iterator[TokenRows]:
    """Yields the samples of a step, `rows_at_once` rows at a time, the longest first.

    Rows are padded to few lengths, so that programs are few; missing rows are all padding.

    Args:
      data: From `tokenise`.
      positions: Positions of the samples.
      rows_at_once: Rows of every call.
      max_length: Longest row in tokens.
      packing: Whether short samples share rows as long as the longest sample of the step.
    """
    lengths = {int(i): len(data.tokens[i]) for i in positions}
    order = sorted(lengths, key=lambda i: -lengths[i])
    longest = bucket_length(lengths[order[0]], max_length)
    shared = _packed(order, lengths, longest) if packing else [[i] for i in order]
    for start in range(0, len(shared), rows_at_once):
        some = shared[start : start + rows_at_once]
        length = bucket_length(max(sum(lengths[i] for i in row) for row in some), max_length)
        yield _rows(data, some, rows_at_once, length)


def _packed(order: Sequence[int], lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Puts every sample, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(i)
        room[place] -= lengths[i]
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def _rows(data: Tokenised, some: list[list[int]], num_rows: int, length: int) -> TokenRows:
    tokens, segments = np.zeros((2, num_rows, length), np.int32)
    counts = np.zeros((num_rows, length), bool)
    for r, members in enumerate(some):
        start = 0
        for number, i in enumerate(members, start=1):
            ids = data.tokens[i]
            end = start + len(ids)
            tokens[r, start:end] = ids
            segments[r, start:end] = number
            counts[r, start + max(int(data.num_prompt[i]), 1) : end] = True
            start = end
    return TokenRows(tokens, segments, counts)
