"""Host-side validation, before anything is compiled: the one place for error texts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what was expected."""


MODES = ("default", "official")


def mode(value: str) -> None:
    """Raises unless `value` is a mode."""
    one_of("mode", value, MODES)


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises unless `value` is one of `choices`; the message lists them and the nearest one."""
    options = [str(choice) for choice in choices]
    if str(value) in options:
        return
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name}: unknown value {value!r}; valid: {', '.join(options)}.{hint}")


def keep_fraction(value: float, name: str = "keep_fraction") -> None:
    """Raises unless 0 < value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        hint = ""
        if isinstance(value, (int, float)) and 1 < value < 100:
            hint = f" Did you mean {value / 100:g}?"
        raise InputError(
            f"{name}: the fraction of samples kept must lie strictly between 0 and 1, "
            f"got {value!r}.{hint}"
        )


def split(value: float, name: str = "split") -> None:
    """Raises unless 0 < value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(
            f"{name}: the share of a class that counts as easy (gamma) must lie strictly "
            f"between 0 and 1, got {value!r}."
        )


def at_least(name: str, value: float, minimum: float, *, exclusive: bool = False) -> None:
    """Raises unless value >= minimum (> if exclusive) and finite."""
    if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
        sign = ">" if exclusive else ">="
        raise InputError(f"{name}: must be {sign} {minimum}, got {value!r}.")


def at_most(name: str, value: float, maximum: float, *, exclusive: bool = False) -> None:
    """Raises unless value <= maximum (< if exclusive)."""
    if not value <= maximum or (exclusive and value == maximum):
        sign = "<" if exclusive else "<="
        raise InputError(f"{name}: must be {sign} {maximum}, got {value!r}.")


def dataset_is_consistent(
    name: str, num_images: int, labels: np.ndarray, ids: np.ndarray, class_names: Sequence[str]
) -> None:
    """Raises unless images, labels and ids agree in length, labels in range and ids unique."""
    if not num_images == len(labels) == len(ids):
        raise InputError(
            f"{name}: {num_images} images, {len(labels)} labels and {len(ids)} ids; "
            "there must be as many of each."
        )
    if num_images == 0:
        raise InputError(f"{name}: holds no sample.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{name}: labels must be integers [n], found {labels.dtype} {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= len(class_names):
        worst = int(np.argmax((labels < 0) | (labels >= len(class_names))))
        raise InputError(
            f"{name}: sample {ids[worst]!s} has label {labels[worst]}; "
            f"expected 0..{len(class_names) - 1}, one per class name."
        )
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        repeated = unique[counts > 1]
        shown = ", ".join(str(i) for i in repeated[:5])
        raise InputError(
            f"{name}: {len(repeated)} ids occur more than once ({shown}); ids must be unique."
        )


def every_class_has_samples(
    name: str, labels: np.ndarray, class_names: Sequence[str], why: str = ""
) -> None:
    """Raises, naming the classes, if one has no sample (its prototype would not exist)."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if empty.size:
        shown = ", ".join(f"{class_names[j]!r}" for j in empty[:10])
        raise InputError(
            f"{name}: {empty.size} of {len(class_names)} classes have no sample: {shown}. "
            f"Every class needs at least one.{why}"
        )


def scores_fit_labels(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raises unless scores are finite, [n], and labels are non-negative integers, [n]."""
    if scores.ndim != 1 or labels.ndim != 1 or len(scores) != len(labels):
        raise InputError(
            f"scores and labels must be one-dimensional and equally long, "
            f"got shapes {scores.shape} and {labels.shape}."
        )
    if len(scores) == 0:
        raise InputError("scores: there is no sample to select from.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(
            f"labels: expected non-negative integers, got {labels.dtype} "
            f"with minimum {labels.min()!r}."
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise InputError(
            f"scores: {bad.size} are not finite, first at position {bad[0]}: {scores[bad[0]]}."
        )


def losses_are_finite(losses: np.ndarray, ids: np.ndarray) -> None:
    """Raises, naming probe and sample, if a loss is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        k, i = bad[0]
        raise InputError(
            f"{len(bad)} losses are not finite, first for sample {ids[i]!s} at probe {k}: "
            f"{losses[k, i]}. Are the encoder's weights and normalisation right?"
        )
