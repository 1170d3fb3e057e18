"""Rows of instruction data as their source has them, and how those that do not fit are named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from dlc_jax import expect

Row = Mapping[str, Any]
Found = TypeVar("Found")


class Unfit(Exception):
    """What is wrong with a row, as the predicate of a sentence about rows: `have no response`."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one source, in its order.

    Attributes:
      rows: At least one.
      name: Name of the source.
    """

    rows: Sequence[Row] = dataclasses.field(repr=False)
    name: str

    @functools.cached_property
    def places(self) -> list[str]:
        """What messages call each row: its `id`, or its number counted from 1."""
        ids = (on_one_line(row.get("id", "")) for row in self.rows)
        return [name if name not in ("", "None") else f"row {i}" for i, name in enumerate(ids, 1)]

    def refuse(self, is_bad: Iterable[bool], problem: str) -> None:
        """Raises ValueError, naming the rows, if there are any for which `is_bad` holds."""
        bad = [place for place, value in zip(self.places, is_bad, strict=True) if value]
        if bad:
            raise expect.InputError(f"{self.name}: {len(bad)} {problem}: {expect.listed(bad)}.")

    def each(self, values: Iterable[Any], read: Callable[[Any], Found]) -> list[Found]:
        """Returns `read(value)` of a value per row.

        Raises:
          ValueError: naming all rows with the problem of the first one for which `read` raises
            `Unfit`.
        """
        found: list[Any] = []
        for value in values:
            try:
                found.append(read(value))
            except Unfit as problem:
                found.append(problem)
        problems = [str(value) if isinstance(value, Unfit) else None for value in found]
        if first := next(filter(None, problems), None):
            self.refuse((problem == first for problem in problems), first)
        return found


def on_one_line(value: Any) -> str:
    """Returns a value as it stands in a message."""
    return "\\n".join(str(value).splitlines())


def is_empty(value: Any) -> bool:
    """Whether a value of a row holds nothing: null, blank text, or nothing but such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        value = list(value.values())
    return all(map(is_empty, value)) if isinstance(value, list | tuple) else value is None
