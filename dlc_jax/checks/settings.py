"""Settings: numbers in their range, names out of a list."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dlc_jax.checks.errors import InputError, listed, shortened

_MOST_CHOICES = 20  # beyond them, choices are names from a file


def is_a(kind: type, **values: Any) -> None:
    """Raises unless each value, by its name, is of this public kind."""
    for name, value in values.items():
        if not isinstance(value, kind):
            found = shortened(repr(value))
            raise InputError(f"{name}: expected dlc.{kind.__name__}(...), got {found}.")


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises unless `value` is one of `choices`; the message lists them and the nearest one."""
    options = [str(choice) for choice in choices]
    if str(value) in options:
        return
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = listed(options) if len(options) > _MOST_CHOICES else ", ".join(options)
    raise InputError(f"{name}: unknown value {value!r}; valid: {shown}.{hint}")


def keep_fraction(value: float, name: str = "keep_fraction") -> None:
    """Raises unless 0 < value < 1."""
    is_percent = isinstance(value, numbers.Real) and 1 < value < 100
    hint = f" Did you mean {float(value) / 100:g}?" if is_percent else ""
    _open_fraction(name, value, "the fraction of samples kept", hint)


def split(value: float, name: str = "split") -> None:
    """Raises unless 0 < value < 1."""
    _open_fraction(name, value, "the share of a class that counts as easy (gamma)")


def _open_fraction(name: str, value: Any, what: str, hint: str = "") -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) < 1:
        raise InputError(f"{name}: {what} must lie strictly between 0 and 1, got {value!r}.{hint}")


def is_hub_id(text: str) -> bool:
    """Whether it can be the id of a repository of the Hugging Face hub, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None


def seed(value: int, name: str = "seed") -> None:
    """Raises unless `value` is an integer in [0, 2^32), which every generator used takes."""
    if not isinstance(value, numbers.Integral) or not 0 <= value < 2**32:
        raise InputError(f"{name}: expected an integer in [0, 2**32), got {value!r}.")


def number(name: str, value: Any) -> None:
    """Raises unless `value` is a number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InputError(f"{name}: expected a number, got {value!r}.")


def integer(name: str, value: Any, minimum: int | None = None) -> None:
    """Raises unless `value` is an integer, and not below the minimum, if there is one."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name}: expected an integer, got {value!r}.")
    if minimum is not None:
        at_least(name, value, minimum)


def at_least(name: str, value: Any, minimum: float, *, exclusive: bool = False) -> None:
    """Raises unless value >= minimum (> if exclusive) and finite."""
    number(name, value)
    is_finite = isinstance(value, numbers.Integral) or math.isfinite(value)
    if not is_finite or value < minimum or (exclusive and value == minimum):
        sign = ">" if exclusive else ">="
        raise InputError(f"{name}: must be {sign} {minimum}, got {value!r}.")


def at_most(name: str, value: Any, maximum: float, *, exclusive: bool = False) -> None:
    """Raises unless value <= maximum (< if exclusive)."""
    number(name, value)
    if not value <= maximum or (exclusive and value == maximum):
        sign = "<" if exclusive else "<="
        raise InputError(f"{name}: must be {sign} {maximum}, got {value!r}.")


def normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises unless both are given, three finite numbers each, std positive; or neither."""
    if (mean is None) != (std is None):
        raise InputError("encoder.mean, encoder.std: give both or neither.")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or not np.all(np.isfinite(values))):
            raise InputError(f"encoder.{name}: expected three finite numbers, got {values}.")
    if std is not None and min(std) <= 0:
        raise InputError(f"encoder.std: must be positive, got {std}.")


def optimiser(where: str, settings: Any) -> None:
    """Raises unless the attributes that torch's SGD and MultiStepLR use are in range."""
    integer(f"{where}.epochs", settings.epochs, 0)
    integer(f"{where}.batch_size", settings.batch_size, 1)
    at_least(f"{where}.learning_rate", settings.learning_rate, 0, exclusive=True)
    for milestone in settings.milestones:
        at_least(f"{where}.milestones", milestone, 0, exclusive=True)
        at_most(f"{where}.milestones", milestone, 1)
    at_least(f"{where}.weight_decay", settings.weight_decay, 0)
    at_least(f"{where}.momentum", settings.momentum, 0)
    at_most(f"{where}.momentum", settings.momentum, 1, exclusive=True)
    if settings.nesterov and settings.momentum == 0:
        raise InputError(f"{where}.nesterov: needs a momentum above 0, got {where}.momentum 0.")
