"""The rows of instruction data, read from files, tables, a hub and the bundled sample."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.files import matching
from dlc_jax.datasets.tables import Table, open_hf, open_parquet
from dlc_jax.datasets.templates import Row
from dlc_jax.files.json_files import without_repetition

_DEMOS = {"dolly/train": "train.jsonl", "dolly/test": "test.jsonl"}


def _of_files(scheme: str, read: Callable[[Path], list[Row]], where: str) -> list[Row]:
    return [row for file in matching(scheme, where) for row in read(file)]


def _lines(file: Path) -> list[Row]:
    rows = []
    with open(file, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix("\ufeff")  # where files were joined, not only the first
                if line.strip():
                    rows.append(_object(_parsed(line), f"{file}, line {number}"))
        except expect.InputError:
            raise
        except (ValueError, RecursionError) as error:
            found = expect.first_line(error)
            raise expect.InputError(f"{file}, line {len(rows) + 1} on: {found}.") from error
    return rows


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_integer, object_pairs_hook=without_repetition)


def _integer(digits: str) -> int:
    """Returns the number; of one that is too long to be kept, one that is refused as well."""
    return int(digits) if len(digits) <= 20 else 2**64


def _list(file: Path) -> list[Row]:
    problem = f"{file}: not JSON"
    with expect.refusing(problem, ValueError, RecursionError, shown=expect.first_line):
        rows = _parsed(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise expect.InputError(f"{file}: expected a list of objects, found {type(rows).__name__}.")
    return [_object(row, f"{file}, entry {number}") for number, row in enumerate(rows, 1)]


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise expect.InputError(f"{where}: expected an object, found {type(value).__name__}.")
    for column, cell in value.items():
        try:
            problem = json_problem([column, cell])
        except RecursionError:
            problem = "lists or objects in one another that are too many"
        if problem:
            shown = column.encode("ascii", "backslashreplace").decode()
            raise expect.InputError(f"{where}: column {shown!r} holds {problem}.")
    return value


def _of_tables(tables: Iterable[Table]) -> list[Row]:
    rows: list[Row] = []
    for table in tables:
        names = table.schema.names
        if len(set(names)) < len(names):
            raise expect.InputError(
                f"{table.file}: expected columns of different names, found {expect.listed(names)}."
            )
        columns = [table.values(name) for name in names]
        rows += [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return rows


def _demo(where: str) -> list[Row]:
    """The bundled sample: 400 rows of Dolly+HH-RLHF to prune, 100 others to test on."""
    expect.one_of("demo instructions", where, _DEMOS)
    return _lines(Path(__file__).parent / "instructions_sample" / _DEMOS[where])


ROW_SOURCES: Mapping[str, Callable[[str], list[Row]]] = {
    "jsonl": functools.partial(_of_files, "jsonl", _lines),
    "json": functools.partial(_of_files, "json", _list),
    "parquet": lambda where: _of_tables(open_parquet(matching("parquet", where))),
    "hf": lambda where: _of_tables(open_hf(where)),
    "demo": _demo,
}


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
