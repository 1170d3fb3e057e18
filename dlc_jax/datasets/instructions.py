"""Instruction data: prompts with the responses to them, from JSONL, JSON or Parquet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.datasets.files import matching

_INTRODUCTION = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_MANY = 10  # ids that a message lists


def _alpaca(row: Mapping[str, Any]) -> str:
    """Source: Taori et al. 2023, Stanford Alpaca."""
    instruction = f"### Instruction:\n{row['instruction']}\n\n"
    if not row.get("input"):
        return f"{_INTRODUCTION}. {_REQUEST}{instruction}### Response:\n"
    context = ", paired with an input that provides further context. "
    return (
        f"{_INTRODUCTION}{context}{_REQUEST}{instruction}### Input:\n{row['input']}\n\n"
        "### Response:\n"
    )


def _as_it_is(row: Mapping[str, Any]) -> str:
    return str(row["prompt"])


@dataclasses.dataclass(frozen=True)
class Template:
    """How a row becomes a prompt and a response.

    Attributes:
      prompt: Row -> everything before the response.
      columns: That a row must have, as text.
      response: Column of the response.
      optional: Columns that may be missing or empty.
    """

    prompt: Callable[[Mapping[str, Any]], str]
    columns: tuple[str, ...]
    response: str
    optional: tuple[str, ...] = ()


# "prompt" is for data whose prompts were put into a template already, as in Dolly+HH-RLHF.
TEMPLATES = {
    "alpaca": Template(_alpaca, ("instruction",), "output", ("input",)),
    "prompt": Template(_as_it_is, ("prompt",), "response"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
    """Prompts with responses, in the order of their source.

    Attributes:
      prompts: [n] everything before the response, template included.
      responses: [n] never empty.
      ids: [n] stable names, unique.
      rows: [n] as the source has them.
      name: Of the source.
    """

    prompts: tuple[str, ...] = dataclasses.field(repr=False)
    responses: tuple[str, ...] = dataclasses.field(repr=False)
    ids: np.ndarray = dataclasses.field(repr=False)
    rows: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    name: str = "instructions"

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, positions: Int64[np.ndarray, " k"]) -> Instructions:
        """Returns the samples at these positions."""
        return Instructions(
            tuple(self.prompts[i] for i in positions),
            tuple(self.responses[i] for i in positions),
            self.ids[positions],
            tuple(self.rows[i] for i in positions),
            self.name,
        )

    def without_prompts(self) -> Instructions:
        """Returns the responses with nothing before them."""
        return dataclasses.replace(self, prompts=("",) * len(self))

    def categories(self, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Returns a class id per row and the names of the classes, sorted, by a column of text.

        Raises:
          ValueError: a row without it.
        """
        values = [row.get(column) for row in self.rows]
        lost = [str(i) for i, value in zip(self.ids, values, strict=True) if not _is_text(value)]
        _refuse(self.name, lost, f"have no text in column {column!r}")
        names, labels = np.unique(np.array(values, np.str_), return_inverse=True)
        return labels.astype(np.int32), tuple(names.tolist())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id, prompt and response."""
        digest = hashlib.sha256()
        for row in zip(self.ids.tolist(), self.prompts, self.responses, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def load_instructions(source: str, template: str | None = None) -> Instructions:
    """Loads instruction data.

    Args:
      source: `jsonl:`, `json:` (a list of objects) or `parquet:`, each of a file, a folder or a
        glob.
      template: In `TEMPLATES`; None: the one whose columns are there.
    Returns:
      Ids are the column `id` where it is there and unique; otherwise a hash of prompt and response,
      with a number for repeated ones.
    Raises:
      ValueError: no such file, one that is damaged, no or several templates that fit, columns that
        are missing or no text, and empty responses, by id.
    """
    scheme, separator, where = source.partition(":")
    if not separator:
        raise checks.InputError(f"{source!r}: expected <scheme>:<file>, such as jsonl:train.jsonl.")
    checks.one_of(f"scheme of {source!r}", scheme, _READERS)
    rows = [row for file in matching(scheme, where, f".{scheme}") for row in _READERS[scheme](file)]
    if not rows:
        raise checks.InputError(f"{source}: has no rows.")
    return instructions(rows, template, source)


def instructions(
    rows: Sequence[Mapping[str, Any]], template: str | None = None, name: str = "rows"
) -> Instructions:
    """Makes instruction data of rows; see `load_instructions`."""
    chosen = TEMPLATES[_fitting(rows[0], name) if template is None else _known(template)]
    places = _names(rows)
    needed = (*chosen.columns, chosen.response)
    for column in needed:
        lost = [
            i for i, row in zip(places, rows, strict=True) if not isinstance(row.get(column), str)
        ]
        _refuse(name, lost, f"have no text in column {column!r}")
    for column in chosen.optional:
        kinds = (str, type(None))
        lost = [
            i for i, row in zip(places, rows, strict=True) if not isinstance(row.get(column), kinds)
        ]
        _refuse(name, lost, f"have no text in column {column!r}")
    responses = tuple(row[chosen.response] for row in rows)
    empty = [i for i, response in zip(places, responses, strict=True) if not response.strip()]
    _refuse(name, empty, "have an empty response")
    prompts = tuple(chosen.prompt(row) for row in rows)
    given = [row.get("id") for row in rows]
    ids = (
        [str(i) for i in given]
        if None not in given and len(set(map(str, given))) == len(given)
        else _content_ids(prompts, responses)
    )
    return Instructions(prompts, responses, np.array(ids, np.str_), tuple(map(dict, rows)), name)


def _known(template: str) -> str:
    checks.one_of("template", template, TEMPLATES)
    return template


def _fitting(row: Mapping[str, Any], name: str) -> str:
    fitting = [
        key
        for key, template in TEMPLATES.items()
        if all(column in row for column in (*template.columns, template.response))
    ]
    if len(fitting) != 1:
        expected = "; ".join(
            f"{key}: {', '.join((*t.columns, t.response))}" for key, t in TEMPLATES.items()
        )
        raise checks.InputError(
            f"{name}: columns {', '.join(row)} fit {' and '.join(fitting) or 'no template'}; "
            f"expected those of one ({expected}), or template=... that says which."
        )
    return fitting[0]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what messages call each row, counted from 1."""
    return [str(row["id"]) if "id" in row else f"row {i}" for i, row in enumerate(rows, 1)]


def _content_ids(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    ids, seen = [], Counter[str]()
    for pair in zip(prompts, responses, strict=True):
        digest = hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:16]
        ids.append(f"{digest}-{seen[digest]}" if seen[digest] else digest)
        seen[digest] += 1
    return ids


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _refuse(name: str, which: Sequence[str], problem: str) -> None:
    if which:
        more = f" and {len(which) - _MANY} more" if len(which) > _MANY else ""
        shown = ", ".join(which[:_MANY])
        raise checks.InputError(f"{name}: {len(which)} {problem}: {shown}{more}.")


def _jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with open(file, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_object(json.loads(line), f"{file}, line {number}"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, checks.InputError):
                raise
            found = checks.first_line(error)
            raise checks.InputError(f"{file}, line {len(rows) + 1} on: {found}.") from error
    return rows


def _json(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise checks.InputError(f"{file}: not JSON: {checks.first_line(error)}.") from error
    if not isinstance(rows, list):
        raise checks.InputError(f"{file}: expected a list of objects, found {type(rows).__name__}.")
    return [_object(row, f"{file}, entry {number}") for number, row in enumerate(rows, 1)]


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise checks.InputError(f"{file}: not Parquet: {checks.first_line(error)}.") from error
    return rows


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise checks.InputError(f"{where}: expected an object, found {type(value).__name__}.")
    return value


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
}
