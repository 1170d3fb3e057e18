"""Errors that users cause, and validation before anything is compiled; all error texts."""

from __future__ import annotations

import contextlib
import difflib
import html
import math
import numbers
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, bidirectional overrides, ...
_JOINERS = "\u200c\u200d"  # of Persian, of Indian scripts and of emoji
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def visible(text: str) -> str:
    r"""Returns the text on one line, with invisible characters escaped: `\n`, `\x1b`, `\u202e`.

    Everything else, backslashes too, stays as it is, so that twice is the same as once.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(escaped(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN and char not in _JOINERS


def escaped(char: str) -> str:
    r"""Returns a character by its code point, as in `\x1b` or `\u202e`."""
    return char.encode("unicode_escape").decode()


def show(text: str, *, to_stderr: bool = False) -> None:
    """Prints the text; only its line breaks have an effect on the terminal."""
    file = sys.stderr if to_stderr else sys.stdout
    print("\n".join(map(visible, text.split("\n"))), file=file, flush=True)


def markdown_text(text: str, *, begins_line: bool = False) -> str:
    """Returns one line of Markdown that shows the text as it is: no HTML, links, images, marks.

    Args:
      text: Any.
      begins_line: Whether it begins a line, where it could be a heading, a list item or a rule.
    """
    shown = visible(text)
    shown = re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|!(?=\[)", r"\\\g<0>", shown)
    # these become links without any marks
    shown = re.sub(r"(?i)(?<=\w)(?=:/)|(?<=www)(?=\.)", r"\\", shown)
    if begins_line:
        shown = re.sub(r"^\s*([0-9]+(?=[.)])|(?=[#+=-]))", r"\g<0>\\", shown)
    return html.escape(shown, quote=False)


def csv_cell(value: Any) -> Any:
    """Returns the value of a cell; text that a spreadsheet would compute gets an apostrophe."""
    is_formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def csv_text(cell: str) -> str:
    """Returns the text that `csv_cell` was given."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


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
      shown: What is shown of the error: its text, its `first_line` or `reason`.
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


def reason(error: Exception) -> str:
    """Returns what the system says of a file, without number and path; else the error's text."""
    return getattr(error, "strerror", None) or str(error)


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


def max_similarity(value: float, name: str = "max_similarity") -> None:
    """Raises unless a cosine is in (0, 1), also as single precision has it."""
    _open_fraction(name, value, "the cosine of near-duplicates")
    if np.float32(value) == 1:
        raise InputError(f"{name}: {value!r} is 1 in single precision; expected at most 0.9999999.")


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
