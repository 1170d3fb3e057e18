"""JSON files, read back in the shape they were written in, or refused by file and field."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dlc_jax import expect

# What a value has to be:
#   str, bool, int, float, dict, list, None   that kind; an integer of 64 bits is a number as well,
#                                             and true is none
#   (shape, ...)                              one of these
#   [shape]                                   a list of such values
#   [shape, shape, ...]                       a list of as many values
#   {"name": shape, "name?": shape}           an object with these fields, perhaps others; `?` if
#                                             the field may be missing
#   {compiled pattern: shape}                 an object all of whose names match
#   compiled pattern                          text that matches
Shape: TypeAlias = Any

_KINDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "a list",
    None: "null",
}
NAME = re.compile(r"(?s).*")
SHA256 = re.compile(r"[0-9a-f]{64}")
# of a file below the work directory
BELOW = re.compile(r"(?!/)(?!(.*/)?\.\.(/|$))[^\0\\]+")


def read_json(path: Path, shape: Shape = dict) -> Any:
    """Returns the file's value, {} if there is no such file.

    Args:
      path: The file.
      shape: What the value has to be, see `Shape`.
    Raises:
      ValueError: the file is not valid JSON in UTF-8, names a key twice, or its value has another
        shape.
    """
    if not path.exists():
        return {}
    if not path.is_file():  # a pipe would never end
        raise expect.InputError(f"{path}: no regular file, expected a JSON file.")
    problem, end = f"{path}: cannot be read", "; expected a JSON file."
    with expect.refusing(problem, OSError, shown=expect.reason, end=end):
        return parse_json(path.read_bytes(), shape, path)


def parse_json(content: bytes | str, shape: Shape, path: Path) -> Any:
    """Returns the value of JSON that was read from a file; ValueError as for `read_json`."""
    problem = f"{path}: not valid JSON"
    with expect.refusing(problem, ValueError, RecursionError, shown=expect.first_line):
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=without_repetition)
    if not isinstance(value, dict):
        raise expect.InputError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    check_shape(value, shape, path)
    return value


def check_shape(value: Any, shape: Shape, path: Path, field: str = "") -> None:
    """Raises ValueError, naming file and field, unless the value has the shape."""
    if not _fits(value, shape):
        raise expect.InputError(
            f"{path}: {field or 'its value'} is {_shown(value)}, expected {_expected(shape)}."
        )
    if isinstance(shape, list):
        parts = shape * len(value) if len(shape) == 1 else shape
        for number, (item, part) in enumerate(zip(value, parts, strict=True)):
            check_shape(item, part, path, f"{field}[{number}]")
    elif isinstance(shape, Mapping):
        for name, part in shape.items():
            if isinstance(name, re.Pattern):
                for own, item in value.items():
                    if not name.fullmatch(own):
                        raise expect.InputError(
                            f"{path}: {field or 'its value'} has the name {own[:60]!r}, expected "
                            f"{_expected(name)}."
                        )
                    check_shape(item, part, path, f"{field}.{own}".lstrip("."))
                continue
            key = name.removesuffix("?")
            inner = f"{field}.{key}".lstrip(".")
            if key in value:
                check_shape(value[key], part, path, inner)
            elif key == name:
                raise expect.InputError(f"{path}: {inner} is missing, expected {_expected(part)}.")
    elif isinstance(shape, tuple):  # the first that fits on the outside is meant
        check_shape(value, next(part for part in shape if _fits(value, part)), path, field)


def _fits(value: Any, shape: Shape) -> bool:
    """Whether a value is of the right kind, whatever is in it."""
    if isinstance(shape, tuple):
        return any(_fits(value, part) for part in shape)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if isinstance(shape, list):
        return isinstance(value, list) and len(shape) in (1, len(value))
    if shape is None:
        return value is None
    if isinstance(value, bool):
        return shape is bool
    if shape in (int, float) and isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, dict if isinstance(shape, Mapping) else shape)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        parts = "values" if isinstance(value, list) else "fields"
        return f"{_KINDS[type(value)]} of {len(value)} {parts}"
    return expect.shortened(repr(value))


def _expected(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_expected(part) for part in shape)
    if isinstance(shape, re.Pattern):
        named = {SHA256: "a SHA-256", BELOW: "a path below the work directory"}
        return named.get(shape, f"text like {shape.pattern}")
    if isinstance(shape, list):
        return _KINDS[list] + (f" of {len(shape)} values" if len(shape) > 1 else "")
    return _KINDS[dict] if isinstance(shape, Mapping) else _KINDS[shape]


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object; ValueError for a key that is there twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found
