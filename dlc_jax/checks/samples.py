"""Data sets, ids, labels, scores and losses, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dlc_jax.checks.errors import InputError, first_line, listed

_MOST_CLASSES = 10**7  # above it, labels are something else than class ids


def dataset_is_consistent(
    name: str, num_images: int, labels: np.ndarray, ids: np.ndarray, class_names: Sequence[str]
) -> None:
    """Raises unless images, labels and ids agree in length, labels in range and ids unique text.

    Class names are text, too, and not empty.
    """
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
    nameless = [j for j, class_name in enumerate(class_names) if not str(class_name).strip()]
    for sample in np.flatnonzero(np.isin(labels, nameless))[:1]:
        raise InputError(
            f"{name}: sample {ids[sample]!s} has the class name "
            f"{class_names[labels[sample]]!r}; expected one that is not empty."
        )
    for what, names in (("id", ids.tolist()), ("class name", [*map(str, class_names)])):
        no_nul(name, what, names)
        try:
            "\0".join(names).encode()
        except UnicodeEncodeError as error:  # bytes of a name that are no UTF-8 become such text
            bad = next(n for n in names if any(0xD800 <= ord(char) < 0xE000 for char in n))
            raise InputError(f"{name}: {what} {bad!r} is not valid UTF-8.") from error
    if (repeated := _repeated(ids)).size:
        raise InputError(
            f"{name}: {len(repeated)} ids occur more than once ({listed(repeated)}); ids must be "
            "unique."
        )


def as_ids(name: str, ids: Iterable[Any]) -> np.ndarray:
    """Returns ids as an array of text, [n]; ValueError if one holds NUL or is no text."""
    given = ids if isinstance(ids, np.ndarray) else list(ids)
    no_nul(name, "id", given)
    try:
        return np.asarray(given, dtype=np.str_)
    except (UnicodeDecodeError, ValueError) as error:  # bytes that are not ASCII, lists of lists
        raise InputError(f"{name}: ids are not text: {first_line(error)}.") from error


def no_nul(name: str, what: str, texts: Iterable[Any]) -> None:
    """Raises if a text holds NUL; NumPy drops it at the end, and two ids become one."""
    for text in texts:
        if b"\0" in text if isinstance(text, bytes) else "\0" in str(text):
            raise InputError(f"{name}: {what} {text!r} holds the character NUL, expected none.")


def positions(name: str, values: np.ndarray, num_samples: int) -> None:
    """Raises unless they are one or more different integers in [0, num_samples)."""
    if values.size == 0:
        raise InputError(f"{name}: is empty, expected one or more positions.")
    if values.dtype == bool:
        raise InputError(f"{name}: is a mask, expected positions; np.flatnonzero gives them.")
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"{name}: expected one or more positions, integers [k], got {values.dtype} "
            f"{values.shape}."
        )
    outside = values[(values < 0) | (values >= num_samples)]
    if outside.size:
        raise InputError(
            f"{name}: {outside.size} positions are out of range, first {outside[0]}; expected "
            f"0..{num_samples - 1}."
        )
    no_repetition(name, values)


def no_repetition(name: str, values: np.ndarray) -> None:
    """Raises if a value occurs twice."""
    if (repeated := _repeated(values)).size:
        raise InputError(
            f"{name}: {len(repeated)} occur more than once, first {repeated[0]!s}; expected each "
            "at most once."
        )


def _repeated(values: np.ndarray) -> np.ndarray:
    unique, counts = np.unique(values, return_counts=True)
    return unique[counts > 1]


def prototypes_can_differ(
    name: str, labels: np.ndarray, class_names: Sequence[str], why: str = ""
) -> None:
    """Raises unless there are two classes or more, and none, whose prototype is missed, is empty.

    Args:
      name, labels, class_names: A data set's.
      why: What the message ends with, if classes are empty; "": how to leave them out.
    """
    empty = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if empty.size:
        shown = listed(repr(class_names[int(j)]) for j in empty)
        hint = why or " dataset.without_empty_classes() leaves them out."
        raise InputError(
            f"{name}: {empty.size} of {len(class_names)} classes have no sample: {shown}. "
            f"Every class needs at least one.{hint}"
        )
    if len(class_names) < 2:
        raise InputError(
            f"{name}: has one class only ({class_names[0]!r}); every loss would be 0. "
            "Expected two classes or more."
        )


def some_readable(name: str, num_readable: int, num_samples: int) -> None:
    """Raises if there is not a single readable sample."""
    if num_readable == 0:
        raise InputError(f"{name}: none of its {num_samples} images is readable.")


def scores_fit_labels(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raises unless scores are finite, [n], and labels are class ids, [n]."""
    if scores.ndim != 1 or labels.ndim != 1 or len(scores) != len(labels):
        raise InputError(
            f"scores and labels must be one-dimensional and equally long, "
            f"got shapes {scores.shape} and {labels.shape}."
        )
    if not np.issubdtype(scores.dtype, np.number):
        raise InputError(f"scores: expected numbers, got {scores.dtype}.")
    class_ids(labels)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise InputError(
            f"scores: {bad.size} are not finite, first at position {bad[0]}: {scores[bad[0]]}."
        )


def class_ids(labels: np.ndarray) -> None:
    """Raises unless labels are one or more integers, [n], that can be class ids."""
    if labels.ndim != 1:
        raise InputError(f"labels: expected class ids [n], got shape {labels.shape}.")
    if len(labels) == 0:
        raise InputError("labels: there is no sample to select from.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(
            f"labels: expected non-negative integers, got {labels.dtype} "
            f"with minimum {labels.min()!r}."
        )
    if labels.max() > _MOST_CLASSES:
        raise InputError(
            f"labels: expected class ids 0..c-1, got {labels.max()}; np.unique(labels, "
            "return_inverse=True)[1] gives such ids."
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


def features_fit_labels(name: str, features: np.ndarray, labels: np.ndarray) -> None:
    """Raises unless features are finite, [n, d], and labels non-negative integers, [n]."""
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not features.size:
        raise InputError(
            f"{name}: expected [n, d], one row per label, got shape {features.shape} for labels "
            f"{labels.shape}."
        )
    if not np.issubdtype(features.dtype, np.floating):
        raise InputError(f"{name}: expected floating numbers, got {features.dtype}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(f"{name}: expected labels that are non-negative integers.")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise InputError(f"{name}: {bad.size} rows are not finite, first at position {bad[0]}.")


def probabilities_fit_labels(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Raises unless rows, [n, c], are probabilities that add up to 1 within 0.001."""
    features_fit_labels("probabilities", probabilities, labels)
    negative = np.flatnonzero((probabilities < 0).any(axis=1))
    if negative.size:
        raise InputError(
            f"probabilities: {negative.size} rows have values below 0, first at position "
            f"{negative[0]}; expected softmax outputs, not logits."
        )
    sums = probabilities.sum(axis=1, dtype=np.float64)
    off = np.flatnonzero(np.abs(sums - 1) > 1e-3)
    if off.size:
        raise InputError(
            f"probabilities: {off.size} rows do not add up to 1, first at position {off[0]}: "
            f"{sums[off[0]]:g}; expected softmax outputs."
        )
