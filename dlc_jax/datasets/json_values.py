"""What JSON has no form of, or what other programs read as something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def json_problem(value: Any) -> str | None:
    """Returns what is wrong with a value, or with one in it; None if it can be written as JSON.

    Dates may be in it, which are written as text.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        is_text = value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)
        return None if is_text else "half of a surrogate pair, which is no character"
    if isinstance(value, int):
        fits = -(2**63) <= value < 2**64
        return None if fits else "an integer beyond 64 bits; text could hold it"
    if isinstance(value, float):
        return None if math.isfinite(value) else "a number that is NaN or infinite; expected null"
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(json_problem, value)), None)
    return None if hasattr(value, "isoformat") else f"a value of type {type(value).__name__}"
