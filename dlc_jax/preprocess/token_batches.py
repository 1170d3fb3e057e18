"""Tokenised instructions in rows and batches of few shapes, with little padding."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dlc_jax.preprocess.tokens import Tokenised

TOKENS_PER_BATCH = 8192  # of a program call, where nothing else is asked for
_SHORTEST = 32  # bucket, in tokens
_MOST_LENGTHS, _MOST_PADDING = 6, 0.1  # of batches that are planned


def bucket_length(length: int, max_length: int) -> int:
    """Returns the shape a sequence is padded to: two to each power of two, at most `max_length`."""
    step = 1 << max((length - 1).bit_length() - 2, _SHORTEST.bit_length() - 1)
    return min(-(-length // step) * step, max_length)


class BatchPlan(NamedTuple):
    """Which samples share which row of a batch, before it is made.

    Attributes:
      rows: Positions of the samples of each row, one behind the other.
      num_rows: At least as many.
      length: Length of every row, in tokens.
    """

    rows: list[list[int]]
    num_rows: int
    length: int

    @property
    def positions(self) -> list[int]:
        """Positions of all samples, row by row."""
        return [position for row in self.rows for position in row]


def plan_batches(data: Tokenised, tokens_per_batch: int) -> list[BatchPlan]:
    """Lays all samples out in batches of about equally many tokens, those of short rows first.

    Rows have six lengths at most, each half the next, since every one is a program to compile.
    Short samples share rows, so that little is padding: a row has room for twice its first sample
    where a length has. The longest row is as long as the longest sample; where more than a tenth
    would be padding then, twice as long rows and smaller batches are tried.

    Args:
      data: From `tokenise`.
      tokens_per_batch: Rows times length, at most, unless one row is longer.
    """
    lengths = dict(enumerate(map(len, data.tokens)))
    longest = max(lengths.values())
    sizes = [
        (int(share * tokens_per_batch), times * longest)
        for share, times in itertools.product((1, 0.75, 0.5), (1, 2))
    ]
    tried = []
    for num_tokens, length in [size for size in sizes if size[1] <= size[0]] or sizes[:1]:
        plans = _plan_batches(lengths, num_tokens, length)
        tried.append((padding(data, plans), plans))
        if tried[-1][0] <= _MOST_PADDING:
            break
    return min(tried, key=lambda pair: pair[0])[1]


def padding(data: Tokenised, plans: list[BatchPlan]) -> float:
    """Returns which share of all batches is padding."""
    num_tokens = sum(map(len, data.tokens))
    return 1 - num_tokens / sum(plan.num_rows * plan.length for plan in plans)


def _plan_batches(lengths: dict[int, int], tokens_per_batch: int, longest: int) -> list[BatchPlan]:
    halved = (max(longest >> i, 2 * _SHORTEST) for i in reversed(range(_MOST_LENGTHS)))
    rooms = [_whole(min(room, longest)) for room in halved]

    def room_of(length: int) -> int:
        return next((room for room in rooms if room >= 2 * length), rooms[-1])

    plans = []
    for rows in packed(lengths, room_of).values():
        length = _whole(max(sum(lengths[i] for i in row) for row in rows))
        num_batches = -(-len(rows) // max(1, tokens_per_batch // length))
        num_rows = -(-len(rows) // num_batches)  # even, so that few are empty
        for start in range(0, len(rows), num_rows):
            plans.append(BatchPlan(rows[start : start + num_rows], num_rows, length))
    return plans


def _whole(length: int) -> int:
    """Rounds up to what devices compute at once."""
    return -(-length // 8) * 8


def packed(lengths: Mapping[int, int], room_of: Callable[[int], int]) -> dict[int, list[list[int]]]:
    """Puts samples into rows, the longest first, each where it leaves the least room.

    Args:
      lengths: Position -> tokens of the sample.
      room_of: Tokens of the first sample of a row -> length of the row.
    Returns:
      Length -> positions of the samples of each row, the shortest length first.
    """
    found: dict[int, list[list[int]]] = {}
    with_room: dict[int, list[list[int]]] = {}  # tokens that have room -> rows
    rooms: list[int] = []  # its keys, sorted
    for position in sorted(lengths, key=lambda position: -lengths[position]):
        length = lengths[position]
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[rooms.pop(place)]
        else:
            room, row = room_of(length), []
            found.setdefault(room, []).append(row)
        row.append(position)
        if room - length not in with_room:
            bisect.insort(rooms, room - length)
        with_room.setdefault(room - length, []).append(row)
    return dict(sorted(found.items()))


class PlacedSample(NamedTuple):
    """Where a sample is among rows.

    Attributes:
      row: Number of its row.
      number: Which sample of its row it is, from 1.
      tokens: Its part of the row.
      position: Its position in the data.
    """

    row: int
    number: int
    tokens: slice
    position: int


def placed(data: Tokenised, rows: Iterable[Sequence[int]]) -> Iterator[PlacedSample]:
    """Yields where every sample is, row by row."""
    for row, members in enumerate(rows):
        start = 0
        for number, position in enumerate(members, start=1):
            end = start + len(data.tokens[position])
            yield PlacedSample(row, number, slice(start, end), position)
            start = end


def make_rows(
    data: Tokenised, rows: Iterable[Sequence[int]], num_rows: int, length: int
) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]]:
    """Returns ids, and which sample of its row each is of, from 1; both are 0 where there is none.

    Args:
      data: From `tokenise`.
      rows: Positions of the samples of each row.
      num_rows: At least as many.
      length: Length of every row, in tokens.
    """
    tokens, segments = np.zeros((2, num_rows, length), np.int32)
    for row, number, where, position in placed(data, rows):
        tokens[row, where], segments[row, where] = data.tokens[position], number
    return tokens, segments
