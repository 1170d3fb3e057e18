"""Instruction data: prompts with the responses to them, and the sources they are read from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.files import matching
from dlc_jax.datasets.labels import content_ids, encode_labels
from dlc_jax.datasets.tables import Table, open_hf, open_parquet
from dlc_jax.datasets.templates import TEMPLATES, Row, Rows, texts_of, told_by_columns
from dlc_jax.files.json_files import without_repetition


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
    """Prompts with responses, in the order of their source.

    Attributes:
      prompts: [n] everything before the response, template included.
      responses: [n] never empty.
      ids: [n] stable names, unique.
      rows: [n] as the source has them.
      name: Name of the source.
      has_special_tokens: Whether begin and end of sequence are in the texts, as a chat template
        puts them there; otherwise the tokenizer adds them.
    """

    prompts: tuple[str, ...] = dataclasses.field(repr=False)
    responses: tuple[str, ...] = dataclasses.field(repr=False)
    ids: np.ndarray = dataclasses.field(repr=False)
    rows: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    name: str = "instructions"
    has_special_tokens: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, positions: Int64[np.ndarray, " k"]) -> Instructions:
        """Returns the samples at these positions."""
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in positions),
            responses=tuple(self.responses[i] for i in positions),
            ids=self.ids[positions],
            rows=tuple(self.rows[i] for i in positions),
        )

    def without_prompts(self, begin: str = "") -> Instructions:
        """Returns the responses with nothing before them but `begin` where a prompt begins so."""
        prompts = tuple(begin if prompt.startswith(begin) else "" for prompt in self.prompts)
        return dataclasses.replace(self, prompts=prompts)

    def categories(self, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Returns a class id per row and the names of the classes, sorted, by a column of text.

        Raises:
          ValueError: a row without it.
        """
        values = [row.get(column) for row in self.rows]
        Rows([{"id": i} for i in self.ids], self.name).refuse(
            (not isinstance(value, str) or not value.strip() for value in values),
            f"have no text in column {column!r}",
        )
        expect.no_nul(self.name, f"column {column!r}:", values)
        labels, names, _ = encode_labels(values, None, self.name)
        return labels, names

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id, prompt and response, and over who adds special tokens."""
        digest = hashlib.sha256(b"special tokens" if self.has_special_tokens else b"")
        for row in zip(self.ids.tolist(), self.prompts, self.responses, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def load_instructions(
    source: str, template: str | None = None, *, tokenizer: Any = None
) -> Instructions:
    """Loads instruction data.

    Args:
      source: `jsonl:`, `json:` (a list of objects) or `parquet:`, each of a file, a folder or a
        glob; `hf:<owner/name or folder>/<split>`, Hugging Face hub or a local copy, see `load_hf`;
        `demo:dolly/train`, `demo:dolly/test`, the bundled sample.
      template: `alpaca`, around `instruction`, `input` and `output`; `prompt`, for `prompt` and
        `response` as they are to be read; `chat`, the tokenizer's own, for `messages`, a list of
        {role, content} that ends with the response, or for either of the other two. None: the one
        whose columns are there.
      tokenizer: For `chat`: a tokenizer of transformers, or a function that returns one, which is
        called if it is needed.
    Returns:
      Ids are the column `id` where it is there and unique; otherwise a hash of prompt and response
      (of the messages, for `chat`), with a number for repeated ones.
    Raises:
      ValueError: an unknown scheme, nothing there, the hub cannot be reached, a damaged file, no
        rows, no or several templates that fit, columns that are missing or no text, and empty
        responses, by id; for `chat`, see also `templates.render`.
    Example:
      >>> data = dlc.load_instructions("demo:dolly/train")
      >>> len(data), data.responses[0][:24]
      (400, 'Kangen water is alkaline')
    """
    scheme, separator, where = source.partition(":")
    if not separator:
        raise expect.InputError(f"{source!r}: expected <scheme>:<file>, such as jsonl:train.jsonl.")
    expect.one_of(f"scheme of {source!r}", scheme, ROW_SOURCES)
    rows = ROW_SOURCES[scheme](where)
    if not rows:
        raise expect.InputError(f"{source}: has no rows.")
    return instructions(rows, template, source, tokenizer=tokenizer)


def instructions(
    rows: Sequence[Row], template: str | None = None, name: str = "rows", *, tokenizer: Any = None
) -> Instructions:
    """Makes instruction data of rows, at least one; see `load_instructions`."""
    named = Rows(rows, name)
    if template is None:
        template = told_by_columns(named, TEMPLATES)
    expect.one_of("template", template, TEMPLATES)
    prompts, responses, identities = texts_of(named, template, tokenizer)
    given = [row.get("id") for row in rows]
    ids = [str(i) for i in given]
    if None in given or len(set(ids)) < len(ids):
        ids = content_ids(map(str.encode, identities))
    unique, copies = expect.as_ids(name, ids), tuple(map(dict, rows))
    return Instructions(prompts, responses, unique, copies, name, template == "chat")


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
