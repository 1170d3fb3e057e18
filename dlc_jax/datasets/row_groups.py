"""Tables in files, of which images are read when asked for: Parquet by row group, Arrow mapped."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.files import LazyImages, regular
from dlc_jax.files.arrow import pa, pc, pq
from dlc_jax.types import ImageSource

_MOST_KEPT = 256 * 2**20  # bytes of row groups in memory; the latest stays, whatever its size


class RecentGroups:
    """The row groups read last, for all files of a data set and all threads that read it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()

    def get(self, key: tuple[Path, int], read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Returns a row group's images; one thread reads, others mostly wait for the same group."""
        with self._lock:
            if key not in self._groups:
                self._groups[key] = read()
                num_bytes = sum(group.nbytes for group in self._groups.values())
                while num_bytes > _MOST_KEPT and len(self._groups) > 1:
                    num_bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups.move_to_end(key)
            return self._groups[key]


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetTable:
    """The rows of a Parquet file; a column is named by itself, or with a field of it behind.

    Attributes:
      file: Path of the file.
      schema: Names and types of its columns.
      metadata: What the file says of its row groups.
      recent: Where images that were read are kept.
    """

    file: Path
    schema: pa.Schema
    metadata: pq.FileMetaData
    recent: RecentGroups

    @classmethod
    def open(cls, file: Path, recent: RecentGroups) -> ParquetTable:
        """Reads what the file says of itself; ValueError names a file that is none."""
        with (
            _refusing(f"{file}: not a readable Parquet file"),
            pa.OSFile(str(regular(file).absolute())) as handle,
        ):
            parquet = pq.ParquetFile(handle)
            return cls(file, parquet.schema_arrow, parquet.metadata, recent)

    def values(self, *column: str) -> list:
        """Returns a column, all of it, as Python's values."""
        with _refusing(f"{self.file}: column {'.'.join(column)} cannot be read"):
            return self._read(range(self.metadata.num_row_groups), column).to_pylist()

    def images(self, *column: str) -> ImageSource:
        """Returns a column of encoded bytes, which is not read yet."""
        starts = self._starts()

        def image(position: int) -> bytes:
            number = int(np.searchsorted(starts, position, side="right")) - 1
            read = functools.partial(self._read_images, number, column)
            group = self.recent.get((self.file, number), read)
            return group[position - int(starts[number])].as_py()

        return LazyImages(int(starts[-1]), image)

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        """Returns the rows without a value, ascending."""
        rows = [np.empty(0, np.int64)]
        for number, start in enumerate(self._starts()[:-1]):
            if not self._is_said_full(number, column):
                with _refusing(f"{self.file}: row group {number} cannot be read"):
                    rows.append(start + _null_rows(self._read([number], column)))
        return np.concatenate(rows)

    def _read_images(self, number: int, column: Sequence[str]) -> pa.ChunkedArray:
        where = f"{self.file}: row group {number}"
        try:
            images = self._read([number], column)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise OSError(f"{where} cannot be read: {error}") from error
        num_rows = self.metadata.row_group(number).num_rows
        if len(images) != num_rows or images.null_count:
            num_found = len(images) - images.null_count
            raise OSError(f"{where} holds {num_found} images, expected {num_rows}")
        return images

    def _starts(self) -> Int64[np.ndarray, " g"]:
        """Returns the first row of each row group, and the end of the last."""
        groups = map(self.metadata.row_group, range(self.metadata.num_row_groups))
        return np.cumsum([0, *(group.num_rows for group in groups)])

    def _is_said_full(self, number: int, column: Sequence[str]) -> bool:
        """Whether the file says that a row group has no row without a value."""
        group = self.metadata.row_group(number)
        chunks = map(group.column, range(group.num_columns))
        stats = next((c.statistics for c in chunks if c.path_in_schema == ".".join(column)), None)
        return stats is not None and stats.has_null_count and stats.null_count == 0

    def _read(self, groups: Sequence[int], column: Sequence[str]) -> pa.ChunkedArray:
        with pa.OSFile(str(self.file.absolute())) as handle:  # a name may begin with a ~
            parquet = pq.ParquetFile(handle, metadata=self.metadata)
            table = parquet.read_row_groups(groups, columns=[".".join(column)], use_threads=False)
        return _part_of(table, column)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrowTable:
    """An Arrow file, as `datasets` saves them, mapped; see `ParquetTable`."""

    file: Path
    table: pa.Table

    @classmethod
    def open(cls, file: Path) -> ArrowTable:
        """Maps the file; ValueError names one that is none."""
        with _refusing(f"{file}: not a readable Arrow file"):
            mapped = pa.memory_map(str(regular(file).absolute()))
            return cls(file, pa.ipc.open_stream(mapped).read_all())

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    def values(self, *column: str) -> list:
        with _refusing(f"{self.file}: column {'.'.join(column)} cannot be read"):
            return self._checked(column).to_pylist()

    def images(self, *column: str) -> ImageSource:
        images = self._checked(column)
        return LazyImages(len(images), functools.partial(_cell, images))

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        return _null_rows(self._checked(column))

    def _checked(self, column: Sequence[str]) -> pa.ChunkedArray:
        values = _part_of(self.table, column)
        with _refusing(f"{self.file}: column {'.'.join(column)} is damaged"):
            values.validate(full=True)  # offsets that lead out of the file would end the process
        return values


Table = ParquetTable | ArrowTable


def _refusing(problem: str) -> AbstractContextManager[None]:
    return expect.refusing(problem, pa.ArrowException, OSError, ValueError)


def _part_of(table: pa.Table, column: Sequence[str]) -> pa.ChunkedArray:
    name, *fields = column
    values = table[name]
    for field in fields:
        values = pc.struct_field(values, field)
    return values


def _cell(column: pa.ChunkedArray, row: int) -> Any:
    return column[row].as_py()


def _null_rows(column: pa.ChunkedArray) -> Int64[np.ndarray, " k"]:
    return np.flatnonzero(column.is_null().to_numpy())
