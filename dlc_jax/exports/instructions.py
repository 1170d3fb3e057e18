"""Kept or dropped instructions with all their original fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlc_jax import expect
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.datasets.row_sources import json_problem
from dlc_jax.exports.forms import json_line
from dlc_jax.files.libraries import pa, pq
from dlc_jax.workspace import artefacts


def write_rows_jsonl(data: Instructions, path: Path) -> None:
    """Writes a line per row, as the source has it; dates as text.

    Raises:
      ValueError: naming row and column, for what JSON has no form of.
    """
    _write_lines("jsonl", data, data.rows, path)


def check_jsonl_holds(data: Instructions) -> None:
    """Raises what `write_rows_jsonl` does."""
    _check_lines("jsonl", data, data.rows)


def write_trl(data: Instructions, path: Path) -> None:
    """Writes a line per sample as trainers read it, up to its last response.

    `messages`, of which all turns are there whichever were scored, with `tools` and
    `chat_template_kwargs` where a sample has them, or a `prompt` and a `completion` of text: TRL's
    forms, which Axolotl and LLaMA-Factory read too.

    Raises:
      ValueError: naming row and column, for what JSON has no form of.
    """
    _write_lines("trl", data, _trl_rows(data), path)


def check_trl_holds(data: Instructions) -> None:
    """Raises what `write_trl` does."""
    _check_lines("trl", data, _trl_rows(data))


def _trl_rows(data: Instructions) -> Sequence[Mapping[str, Any]]:
    if data.conversations is not None:
        talks = data.conversations
        # one form for all rows; columns that none needs are left out
        apart = all(talk.completion is not None for talk in talks)
        rows = [talk.as_row(with_completion=apart) for talk in talks]
        needed = {name for row in rows for name, value in row.items() if value}
        return [{name: row[name] for name in row if name in needed} for row in rows]
    pairs = zip(data.prompts, data.responses, strict=True)
    return [{"prompt": prompt, "completion": response} for prompt, response in pairs]


def _write_lines(
    form: str, data: Instructions, rows: Sequence[Mapping[str, Any]], path: Path
) -> None:
    _check_lines(form, data, rows)
    with artefacts.atomic(path) as file:
        for row in rows:
            file.write(json_line(row, default=lambda date: date.isoformat()))


def _check_lines(form: str, data: Instructions, rows: Sequence[Mapping[str, Any]]) -> None:
    for name, row in zip(data.ids.tolist(), rows, strict=True):
        for column, cell in row.items():
            if problem := json_problem([column, cell]):
                raise expect.InputError(
                    f"{data.name}: column {column!r} of row {name!r} holds {problem}. The form "
                    f"{form} has no place for it; perhaps parquet has."
                )


def write_rows_parquet(data: Instructions, path: Path) -> None:
    """Writes the rows with the columns of the source.

    Raises:
      ValueError: a column whose values have no common type, or one that Parquet does not have.
    """
    with artefacts.atomic(path) as file:
        _write_table(data, file)


def check_parquet_holds(data: Instructions) -> None:
    """Raises what `write_rows_parquet` does."""
    _write_table(data, pa.BufferOutputStream())


def _write_table(data: Instructions, file: Any) -> None:
    rows: list[dict[str, Any]] = list(data.rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    with expect.refusing(
        f"{data.name} does not fit a table",
        *(pa.ArrowException, OverflowError, TypeError, UnicodeError),
        shown=expect.first_line,
        end="; expected form jsonl for it.",
    ):
        arrays = {name: _column([row.get(name) for row in rows]) for name in columns}
        pq.write_table(pa.table(arrays), file)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError:
        return pa.array(values, pa.uint64())


class InstructionExport(NamedTuple):
    """How a form of instructions is written.

    Attributes:
      write: Takes the rows and a path; the file is whole or not there at all.
      suffix: Ending of the file name, with its dot.
      check: Raises ValueError for rows that the form cannot hold. Called before scoring.
    """

    write: Callable[[Instructions, Path], None]
    suffix: str
    check: Callable[[Instructions], None]


INSTRUCTION_EXPORTS: Mapping[str, InstructionExport] = {
    "jsonl": InstructionExport(write_rows_jsonl, ".jsonl", check_jsonl_holds),
    "trl": InstructionExport(write_trl, ".trl.jsonl", check_trl_holds),
    "parquet": InstructionExport(write_rows_parquet, ".parquet", check_parquet_holds),
}
