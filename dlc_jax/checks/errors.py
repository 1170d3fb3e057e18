"""Errors that users cause, and how their messages list and shorten names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from dlc_jax.checks.escaping import visible

_MOST_LISTED = 10


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))  # of data, too


class NeedsSetting(InputError):
    """A sample that is whole, but that a setting has to decide on: never skipped as corrupt."""


class SharedError(InputError):
    """A mistake that all processes of a run meet at the same place, so that they can go on."""


@contextlib.contextmanager
def refusing(
    problem: str,
    *kinds: type[Exception],
    shown: Callable[[Exception], str] = str,
    end: str = ".",
) -> Iterator[None]:
    """Raises `InputError` with `<problem>: <error>.` for errors of these kinds in here.

    Args:
      problem: What cannot be used, and what for.
      kinds: Classes of errors; an `InputError` stays as it is.
      shown: What is shown of the error: its text, or its `first_line`.
      end: What the message ends with.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{problem}: {shown(error)}{end}") from error


def first_line(error: BaseException) -> str:
    """Returns the error's kind and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def listed(names: Iterable[Any], separator: str = ", ") -> str:
    """Returns the names with this between them; of more than ten, ten and how many more."""
    every = [str(name) for name in names]
    more = f" and {len(every) - _MOST_LISTED} more" if len(every) > _MOST_LISTED else ""
    return separator.join(every[:_MOST_LISTED]) + more


def problems(found: Mapping[str, Collection[Any]]) -> str:
    """Returns what is wrong and where, such as `missing: a, b; unused: c`; "" if nothing is."""
    return "; ".join(f"{what}: {listed(where)}" for what, where in found.items() if where)


def shortened(text: str, length: int = 60) -> str:
    """Returns the text; a longer one is cut to `length` characters, of which three are dots."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
