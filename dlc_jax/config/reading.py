"""Settings of any section as a ConfigDict and back: defaults, names, and values of any source."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from dlc_jax import expect


def keys(section: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Returns name, default and meaning of every setting of a section, those of its own too."""
    rows = []
    for field, kind in _fields(section):
        if dataclasses.is_dataclass(kind):
            rows += keys(kind, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}", field.default, field.metadata["doc"]))
    return rows


def _fields(section: Any) -> list[tuple[dataclasses.Field, Any]]:
    kinds = typing.get_type_hints(section)
    return [(field, kinds[field.name]) for field in dataclasses.fields(section)]


def defaults(section: Any) -> dict[str, Any]:
    """Returns the defaults of a section, nested, as a ConfigDict takes them."""
    values: dict[str, Any] = {}
    for field, kind in _fields(section):
        if dataclasses.is_dataclass(kind):
            values[field.name] = defaults(kind)
        elif typing.get_origin(kind) in (typing.Union, types.UnionType):
            # of any type for ConfigDict: `_convert` checks it, and reads the command line's text
            values[field.name] = config_dict.FieldReference(field.default, field_type=object)
        else:
            values[field.name] = field.default
    return values


def build(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns a section with these values.

    Raises:
      ValueError: naming the key, on an unknown key or a wrong type.
    """
    fields = dict((field.name, kind) for field, kind in _fields(section))
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            expect.one_of(f"configuration key {name!r}", name, [f"{prefix}{k}" for k in fields])
        kind = fields[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, (Mapping, ConfigDict)):
                raise expect.InputError(f"{name}: expected a group of settings, got {value!r}.")
            arguments[key] = build(kind, dict(value), f"{name}.")
        else:
            arguments[key] = _convert(name, kind, value)
    return section(**arguments)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """Returns `value` as `kind`; text is read where the kind is not text alone."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value in (None, "None") and type(None) in choices:
            return None
        others = [choice for choice in choices if choice is not type(None)]
        for choice in sorted(others, key=lambda choice: choice is str):  # text fits anything: last
            try:
                return _convert(name, choice, value)
            except expect.InputError:
                continue
    elif origin is tuple:
        if isinstance(value, str):
            value = _literal(value)
        if isinstance(value, (int, float, str)):
            value = (value,)
        takes_text = str in (choices[0], *typing.get_args(choices[0]))
        if takes_text and isinstance(value, (tuple, list)):  # `easiest,hardest` as one text
            value = [part for item in value for part in str(item).split(",")]
        if isinstance(value, (tuple, list)):
            return tuple(_convert(name, choices[0], item) for item in value)
    elif kind is str and isinstance(value, str):
        return value
    elif kind in (int, float, bool):
        read = _literal(value) if isinstance(value, str) else value
        if type(read) is kind:
            return read
        if kind is float and type(read) is int:
            return float(read)
    expected = kind.__name__ if isinstance(kind, type) and origin is None else kind
    raise expect.InputError(f"{name}: expected {expected}, got {value!r}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
