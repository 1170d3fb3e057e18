"""Rows of instruction data, and the sources that they are read from."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.files import matching
from dlc_jax.datasets.huggingface import open_hf
from dlc_jax.datasets.parquet import open_parquet
from dlc_jax.datasets.row_groups import Table
from dlc_jax.files.json_files import without_repetition


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


Row = Mapping[str, Any]

_DEMOS = {"dolly/train": "train.jsonl", "dolly/test": "test.jsonl"}
# Columns of what a model is to see besides the prompt, as common formats call them.
_CONTEXT = (
    *("system", "system_prompt", "history", "context", "documents"),
    *("tools", "functions", "image", "images", "videos", "audios"),
)


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
        return [str(row["id"]) if "id" in row else f"row {i}" for i, row in enumerate(self.rows, 1)]

    def refuse(self, is_bad: Iterable[bool], problem: str) -> None:
        """Raises ValueError, naming the rows, if there are any for which `is_bad` holds."""
        bad = [place for place, value in zip(self.places, is_bad, strict=True) if value]
        if bad:
            raise expect.InputError(f"{self.name}: {len(bad)} {problem}: {expect.listed(bad)}.")

    def refuse_context(self, template: str) -> None:
        """Raises ValueError, naming column and rows, for context that a template leaves out."""
        for column in sorted({name for row in self.rows for name in row}):
            if column.lower() in _CONTEXT:
                self.refuse(
                    (not is_empty(row.get(column)) for row in self.rows),
                    f"have {column!r}, which template {template!r} does not use; expected it in "
                    "'messages' or the prompt, and the column left out or empty",
                )


def is_empty(value: Any) -> bool:
    """Whether a value of a row holds nothing: null, blank text, or nothing but such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        value = list(value.values())
    return all(map(is_empty, value)) if isinstance(value, list | tuple) else value is None


def read_rows(source: str) -> list[Row]:
    """Reads `<scheme>:<where>`, see `load_instructions`.

    Raises:
      ValueError: an unknown scheme, nothing there, a damaged file, or no rows.
    """
    scheme, separator, where = source.partition(":")
    if not separator:
        raise expect.InputError(f"{source!r}: expected <scheme>:<file>, such as jsonl:train.jsonl.")
    expect.one_of(f"scheme of {source!r}", scheme, ROW_SOURCES)
    rows = ROW_SOURCES[scheme](where)
    if not rows:
        raise expect.InputError(f"{source}: has no rows.")
    return rows


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
