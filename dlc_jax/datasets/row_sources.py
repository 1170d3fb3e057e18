"""The rows of instruction data, read from files, tables, a hub and the bundled sample."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dlc_jax import expect
from dlc_jax.datasets.files import matching, regular
from dlc_jax.datasets.rows import Row
from dlc_jax.datasets.tables import Table, find_hf, open_parquet
from dlc_jax.files.json_files import without_repetition
from dlc_jax.files.libraries import pa

_DEMOS = {"dolly/train": "train.jsonl", "dolly/test": "test.jsonl"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_ENDINGS = {
    scheme: tuple(f"{name}{codec}" for name in names for codec in ("", *_CODECS))
    for scheme, names in {"jsonl": (".jsonl", ".ndjson"), "json": (".json",)}.items()
}
_LIST = "; a list of objects is read as json:<file>"
_LINES = "; lines of objects are read as jsonl:<file>"
# What is decompressed can be a thousand times its file.
_MOST_IN_LINE = 2**28  # characters
_MOST_IN_LIST = 2**31
_AT_ONCE = 2**20


def _of_files(scheme: str, read: Callable[[Path], list[Row]], where: str) -> list[Row]:
    files = matching(scheme, where, _ENDINGS[scheme])
    _refuse_twins(f"{scheme}:{where}", files)
    return [row for file in files for row in read(file)]


def _refuse_twins(source: str, files: Iterable[Path]) -> None:
    """Raises ValueError for `a.jsonl` beside `a.jsonl.gz`, of which every row would count twice."""
    known: dict[str, Path] = {}
    for file in files:
        shard = re.sub(r"(\.(jsonl|ndjson|json))?(\.(gz|zst))?$", "", str(file), flags=re.I)
        other = known.setdefault(shard, file)
        if other != file:
            raise expect.InputError(
                f"{source}: {other} and {file} are one file in two forms, whose rows would count "
                "twice; expected one of them."
            )


@contextlib.contextmanager
def _text(file: Path) -> Iterator[TextIO]:
    """Gives a file's text, which is decompressed while it is read, as the suffix says."""
    codec = _codec(file)
    problem = f"{file}: cannot be read as {codec or 'text'}"
    with expect.refusing(problem, OSError, shown=expect.reason):
        if codec is None:
            with open(regular(file), encoding="utf-8") as text:
                yield text
            return
        if not regular(file).stat().st_size:
            raise OSError("it is empty")  # which decompresses to nothing, and was perhaps cut off
        with (
            pa.input_stream(str(file.absolute()), compression=codec) as stream,
            io.TextIOWrapper(stream, encoding="utf-8") as text,
        ):
            yield text


def _codec(file: Path) -> str | None:
    return _CODECS.get(file.suffix.lower())


def _lines(file: Path) -> list[Row]:
    rows: list[Row] = []
    line = ""
    with _text(file) as text:
        try:
            lines = iter(functools.partial(text.readline, _MOST_IN_LINE + 1), "")
            for number, line in enumerate(lines, 1):
                if len(line) > _MOST_IN_LINE:
                    raise expect.InputError(
                        f"{file}, line {number}: has more than {_MOST_IN_LINE} characters; "
                        "expected one object per line."
                    )
                line = line.removeprefix("\ufeff")  # where files were joined, not only the first
                if line.strip():
                    where = f"{file}, line {number}"
                    rows.append(_object(_parsed(line), where, "" if rows else _LIST))
        except expect.InputError:
            raise
        except (ValueError, RecursionError) as error:
            found = expect.first_line(error)
            hint = _LIST if not rows and line.lstrip().startswith("[") else ""
            raise expect.InputError(f"{file}, line {len(rows) + 1} on: {found}{hint}.") from error
    return rows


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_integer, object_pairs_hook=without_repetition)


def _integer(digits: str) -> int:
    """Returns the number; of one that is too long to be kept, one that is refused as well."""
    return int(digits) if len(digits) <= 20 else 2**64


def _list(file: Path) -> list[Row]:
    problem, errors = f"{file}: not JSON", (ValueError, RecursionError)
    most = _MOST_IN_LIST if _codec(file) else math.inf
    parts, num_read = [], 0
    with expect.refusing(problem, *errors, shown=expect.first_line), _text(file) as stream:
        # a little at a time: what is asked for at once is reserved, however short the file
        while part := stream.read(_AT_ONCE):
            parts.append(part)
            num_read += len(part)
            if num_read >= most:
                raise expect.InputError(f"{file}: has {most} characters or more{_LINES}.")
    text = "".join(parts).removeprefix("\ufeff")
    end = f"{_LINES}." if text.lstrip().startswith("{") else "."
    with expect.refusing(problem, *errors, shown=expect.first_line, end=end):
        rows = _parsed(text)
    if not isinstance(rows, list):
        found = type(rows).__name__
        raise expect.InputError(f"{file}: expected a list of objects, found {found}{end}")
    return [_object(row, f"{file}, entry {number}") for number, row in enumerate(rows, 1)]


def _object(value: Any, where: str, if_list: str = "") -> Row:
    if not isinstance(value, dict):
        hint = if_list if isinstance(value, list) else ""
        raise expect.InputError(f"{where}: expected an object, found {type(value).__name__}{hint}.")
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


def _of_hub(where: str) -> list[Row]:
    parts = find_hf(where, sum(_ENDINGS.values(), ()))
    _refuse_twins(f"hf:{where}", (part for part in parts if isinstance(part, Path)))
    rows: list[Row] = []
    for part in parts:
        if not isinstance(part, Path):
            rows += _of_tables([part])
        elif part.suffix == ".parquet":
            rows += _of_tables(open_parquet([part]))
        else:
            rows += _list(part) if _begins_list(part) else _lines(part)
    return rows


def _begins_list(file: Path) -> bool:
    """Whether it is a list, which repositories call `.json` as they do lines of objects."""
    problem = f"{file}: not JSON"
    with expect.refusing(problem, ValueError, shown=expect.first_line), _text(file) as text:
        return text.read(4096).lstrip("\ufeff \t\r\n").startswith("[")


def _demo(where: str) -> list[Row]:
    """The bundled sample: 400 rows of Dolly+HH-RLHF to prune, 100 others to test on."""
    expect.one_of("demo instructions", where, _DEMOS)
    return _lines(Path(__file__).parent / "instructions_sample" / _DEMOS[where])


ROW_SOURCES: Mapping[str, Callable[[str], list[Row]]] = {
    "jsonl": functools.partial(_of_files, "jsonl", _lines),
    "json": functools.partial(_of_files, "json", _list),
    "parquet": lambda where: _of_tables(open_parquet(matching("parquet", where))),
    "hf": _of_hub,
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
