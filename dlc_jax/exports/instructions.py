"""Kept or dropped instructions with all their original fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dlc_jax import artefacts, checks
from dlc_jax.datasets.instructions import Instructions


def write_rows_jsonl(data: Instructions, path: Path) -> None:
    """Writes a line per row, as the source has it; ValueError for what JSON has no form of."""
    with artefacts.atomic(path) as file:
        for row in data.rows:
            file.write(f"{json.dumps(row, ensure_ascii=False, default=_plain)}\n".encode())


def _plain(value: Any) -> str:
    """Dates as text, which is all that JSON has for them."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise checks.InputError(f"{type(value).__name__} is not JSON; expected form parquet for it.")


def write_rows_parquet(data: Instructions, path: Path) -> None:
    """Writes the rows with the columns of the source.

    Raises:
      ValueError: a column whose values have no common type.
    """
    rows: list[dict[str, Any]] = list(data.rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    except pa.ArrowException as error:
        raise checks.InputError(
            f"{path}: {data.name} does not fit a table: {checks.first_line(error)}; expected form "
            "jsonl for it."
        ) from error
    with artefacts.atomic(path) as file:
        pq.write_table(table, file)


INSTRUCTION_EXPORTS: Mapping[str, Callable[[Instructions, Path], None]] = {
    "jsonl": write_rows_jsonl,
    "parquet": write_rows_parquet,
}
