"""Tables in files, of which images are read when asked for: Parquet by row group, Arrow mapped."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from dlc_jax import checks
from dlc_jax.datasets.files import regular
from dlc_jax.files.arrow import pa, pc, pq
from dlc_jax.types import ImageSource

_MOST_KEPT = 256 * 2**20  # bytes of row groups in memory; the latest stays, whatever its size


@runtime_checkable
class Table(Protocol):
    """The rows of one file; a column is named by itself, or with a field of it behind.

    Attributes:
      file: Path or address of the file.
      schema: Names and types of its columns.
    """

    @property
    def file(self) -> Path: ...

    @property
    def schema(self) -> pa.Schema: ...

    def values(self, *column: str) -> list:
        """Returns a column, all of it, as Python's values."""
        ...

    def images(self, *column: str) -> ImageSource:
        """Returns a column of encoded bytes, which is not read yet."""
        ...

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        """Returns the rows without a value, ascending."""
        ...


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
    """A Parquet file.

    Attributes:
      file, schema: See `Table`.
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
        try:
            with pa.OSFile(str(regular(file).absolute())) as handle:
                parquet = pq.ParquetFile(handle)
                return cls(file, parquet.schema_arrow, parquet.metadata, recent)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise checks.InputError(f"{file}: not a readable Parquet file: {error}.") from error

    def values(self, *column: str) -> list:
        try:
            return self._read(range(self.metadata.num_row_groups), column).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise checks.InputError(
                f"{self.file}: column {'.'.join(column)} cannot be read: {error}."
            ) from error

    def images(self, *column: str) -> ImageSource:
        sizes = [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]
        return _ParquetImages(self, column, np.cumsum([0, *sizes]))

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        rows, start = [np.empty(0, np.int64)], 0
        for number in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(number)
            if not self._is_said_full(number, column):
                try:
                    rows.append(start + _null_rows(self._read([number], column)))
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise checks.InputError(
                        f"{self.file}: row group {number} cannot be read: {error}."
                    ) from error
            start += group.num_rows
        return np.concatenate(rows)

    def _is_said_full(self, number: int, column: Sequence[str]) -> bool:
        """Whether the file says that a row group has no row without a value."""
        group = self.metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        chunk = next((c for c in chunks if c.path_in_schema == ".".join(column)), None)
        stats = chunk.statistics if chunk is not None else None
        return stats is not None and stats.has_null_count and stats.null_count == 0

    def _read(self, groups: Sequence[int], column: Sequence[str]) -> pa.ChunkedArray:
        with pa.OSFile(str(self.file.absolute())) as handle:  # a name may begin with a ~
            parquet = pq.ParquetFile(handle, metadata=self.metadata)
            table = parquet.read_row_groups(groups, columns=[".".join(column)], use_threads=False)
        return _part_of(table, column)


@dataclasses.dataclass(frozen=True, eq=False)
class _ParquetImages:
    """A column of encoded bytes; row group i holds the rows starts[i] to starts[i + 1] - 1."""

    table: ParquetTable
    column: tuple[str, ...]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> bytes:
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        start, stop = self.starts[number : number + 2].tolist()

        def read() -> pa.ChunkedArray:
            where = f"{self.table.file}: row group {number}"
            try:
                images = self.table._read([number], self.column)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise OSError(f"{where} cannot be read: {error}") from error
            if len(images) != stop - start or images.null_count:
                raise OSError(
                    f"{where} holds {len(images) - images.null_count} images, "
                    f"expected {stop - start}"
                )
            return images

        images = self.table.recent.get((self.table.file, number), read)
        return images[position - start].as_py()


@dataclasses.dataclass(frozen=True, eq=False)
class ArrowTable:
    """An Arrow file, as `datasets` saves them, mapped."""

    file: Path
    table: pa.Table

    @classmethod
    def open(cls, file: Path) -> ArrowTable:
        """Maps the file; ValueError names one that is none."""
        try:
            mapped = pa.memory_map(str(regular(file).absolute()))
            return cls(file, pa.ipc.open_stream(mapped).read_all())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise checks.InputError(f"{file}: not a readable Arrow file: {error}.") from error

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    def values(self, *column: str) -> list:
        try:
            return self._checked(column).to_pylist()
        except ValueError as error:
            raise checks.InputError(
                f"{self.file}: column {'.'.join(column)} cannot be read: {error}."
            ) from error

    def images(self, *column: str) -> ImageSource:
        return _ArrowImages(self._checked(column))

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        return _null_rows(self._checked(column))

    def _checked(self, column: Sequence[str]) -> pa.ChunkedArray:
        values = _part_of(self.table, column)
        try:
            values.validate(full=True)  # offsets that lead out of the file would end the process
        except pa.ArrowException as error:
            raise checks.InputError(
                f"{self.file}: column {'.'.join(column)} is damaged: {error}."
            ) from error
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class _ArrowImages:
    column: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, position: int) -> bytes:
        return self.column[position].as_py()


def _part_of(table: pa.Table, column: Sequence[str]) -> pa.ChunkedArray:
    name, *fields = column
    values = table[name]
    for field in fields:
        values = pc.struct_field(values, field)
    return values


def _null_rows(column: pa.ChunkedArray) -> Int64[np.ndarray, " k"]:
    return np.flatnonzero(column.is_null().to_numpy())
