"""`parquet:` and `hf:`, tables of images in files or on a hub, and the bundled sample.

Images are read when asked for: of Parquet by row group; Arrow files are mapped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.files import (
    LazyImages,
    images_in,
    joined,
    matching,
    posix_names,
    regular,
    split_in,
)
from dlc_jax.datasets.labels import PATH_COLUMNS, Columns, labelled
from dlc_jax.files.libraries import fetching, pa, pc, pq
from dlc_jax.types import Dataset, ImageSource

_IMAGE_COLUMNS = tuple(dict.fromkeys(("image", "img", *PATH_COLUMNS)))
_DEMOS = {"caltech15/train": "train.parquet", "caltech15/test": "test.parquet"}
_Images = tuple[ImageSource, list[str | None]]
_CONVERTED = "refs/convert/parquet"
_PARQUET = (".parquet",)
# What the hub takes for no data where it looks for JSON.
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
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

        return LazyImages(range(starts[-1]), image)

    def missing(self, *column: str) -> Int64[np.ndarray, " k"]:
        """Returns the rows without a value, ascending."""
        rows, path = [np.empty(0, np.int64)], ".".join(column)
        for number, start in enumerate(self._starts()[:-1]):
            group = self.metadata.row_group(number)
            chunks = map(group.column, range(group.num_columns))
            mine = (chunk.statistics for chunk in chunks if chunk.path_in_schema == path)
            stats = next(mine, None)
            if stats is None or not stats.has_null_count or stats.null_count:
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

    def _read(self, groups: Sequence[int], column: Sequence[str]) -> pa.ChunkedArray:
        with pa.OSFile(str(self.file.absolute())) as handle:  # a name may begin with a ~
            parquet = pq.ParquetFile(handle, metadata=self.metadata)
            table = parquet.read_row_groups(groups, columns=[".".join(column)], use_threads=False)
        return _part_of(table, column)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrowTable:
    """An Arrow file, as `datasets` saves them, mapped; see `ParquetTable`."""

    file: Path
    schema: pa.Schema
    table: pa.Table

    @classmethod
    def open(cls, file: Path) -> ArrowTable:
        """Maps the file; ValueError names one that is none."""
        with _refusing(f"{file}: not a readable Arrow file"):
            mapped = pa.memory_map(str(regular(file).absolute()))
            table = pa.ipc.open_stream(mapped).read_all()
        return cls(file, table.schema, table)

    def values(self, *column: str) -> list:
        with _refusing(f"{self.file}: column {'.'.join(column)} cannot be read"):
            return self._checked(column).to_pylist()

    def images(self, *column: str) -> ImageSource:
        return LazyImages(self._checked(column), operator.methodcaller("as_py"))

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


def _null_rows(column: pa.ChunkedArray) -> Int64[np.ndarray, " k"]:
    return np.flatnonzero(column.is_null().to_numpy())


def load_demo(where: str, columns: Columns) -> Dataset:
    """Loads the bundled sample: 15 Caltech-101 classes, 50 train and 20 test images each."""
    expect.one_of("demo data set", where, _DEMOS)
    file = Path(__file__).parent / "sample" / _DEMOS[where]
    return dataclasses.replace(load_parquet(str(file), columns), name=f"demo:{where}")


def load_parquet(where: str, columns: Columns) -> Dataset:
    """Loads one Parquet file, a folder of them or a glob, in sorted order.

    Images are encoded bytes, {bytes, path}, or paths as in `csv:`, relative to the Parquet file's
    folder or absolute. Encoded ones are read by row group when asked for, and 256 MiB of groups are
    kept: larger files are streamed well in order, and slowly when shuffled.

    Raises:
      ValueError: nothing there, not Parquet, no image or label column, a row without image.
    """
    tables = open_parquet(matching("parquet", where))
    return from_tables(f"parquet:{where}", tables, columns)


def open_parquet(files: Iterable[Path]) -> list[ParquetTable]:
    """Returns the files' tables; ValueError names a file that is none."""
    recent = RecentGroups()
    return [ParquetTable.open(file, recent) for file in files]


def from_tables(source: str, tables: Sequence[Table], columns: Columns) -> Dataset:
    """Returns the rows of all tables, which must have the same image and label columns.

    Raises:
      ValueError: no image or label column or several, columns or class names that differ, a row
        without image.
    """
    names, features = tables[0].schema.names, _declared_features(tables[0].schema)

    def declared(kind: str) -> list[str]:
        return [name for name, feature in features.items() if feature.get("_type") == kind]

    image = columns.find(source, "image", names, _IMAGE_COLUMNS, declared=declared("Image"))
    label = columns.find(source, "label", names, declared=declared("ClassLabel"))
    class_names = _class_names(tables[0], label)
    values: list = []
    all_paths: list[str | None] = []
    parts = []
    for table in tables:
        for name in (image, label):
            if table.schema.names.count(name) != 1:
                raise expect.InputError(
                    f"{source}: its files differ in columns: {table.file} has "
                    f"{expect.listed(table.schema.names)}, expected one {name!r}."
                )
        others = _class_names(table, label)
        if others != class_names:
            raise expect.InputError(
                f"{source}: its files differ in class names: {table.file} declares "
                f"{expect.listed(map(repr, others or ())) or 'none'}, {tables[0].file} "
                f"{expect.listed(map(repr, class_names or ())) or 'none'}."
            )
        values += table.values(label)
        images, paths = _images(table, image)
        parts.append(images)
        all_paths += paths
    return labelled(joined(parts), values, all_paths, source, class_names)


def _declared_features(schema: pa.Schema) -> dict[str, dict]:
    """Returns the features that the `datasets` library wrote into the schema, if any."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"].items()
        # nested features, as for boxes, are lists and are neither image nor label
        return {name: feature for name, feature in features if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # written by something else: the usual column names have to do


def _class_names(table: Table, label: str) -> list[str] | None:
    names = _declared_features(table.schema).get(label, {}).get("names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise expect.InputError(
            f"{table.file}: expected the names of classes to be a list of texts, found "
            f"{expect.listed(names) if isinstance(names, list) else repr(names)}."
        )
    return names


def _images(table: Table, name: str) -> _Images:
    """Returns a table's images, and each one's path where there is one."""
    kind = table.schema.field(name).type
    if _is_text(kind):
        return _files(table, name, table.values(name))
    where: tuple[str, ...] = (name,)
    has_paths = False
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" not in fields:
            raise expect.InputError(
                f"{table.file}: image column has fields {expect.listed(sorted(fields))}, "
                "expected bytes and path."
            )
        where, kind = (name, "bytes"), fields["bytes"]
        has_paths = _is_text(fields.get("path", pa.null()))
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null()):
        raise expect.InputError(
            f"{table.file}: images are {kind}, expected encoded bytes, {{bytes, path}} or paths."
        )
    missing, images = table.missing(*where), table.images(*where)
    paths = table.values(name, "path") if has_paths else [None] * len(images)
    if len(missing) == len(paths) and any(paths):
        return _files(table, name, paths)
    if len(missing):
        raise expect.InputError(
            f"{table.file}: {len(missing)} rows have no image bytes, first row {missing[0]} "
            f"(path {paths[missing[0]]!r})."
        )
    return images, paths


def _files(table: Table, name: str, paths: Sequence[str | None]) -> _Images:
    bad = next((row for row, path in enumerate(paths) if not path or "\0" in path), None)
    if bad is not None:
        raise expect.InputError(
            f"{table.file}: column {name}, row {bad}: expected a path, found {paths[bad]!r}."
        )
    names = posix_names(table.file.parent, map(str, paths))
    return images_in(table.file.parent, names), [*names]


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def load_hf(where: str, columns: Columns) -> Dataset:
    """Loads `<owner/name or folder>/<split>`; parts are joined by `+`, as in `train+validation`.

    A folder is what `datasets.save_to_disk` wrote, or a copy of a repository with its Parquet
    files, whose names hold the split (`data/train-00000-of-00002.parquet`, `train/0000.parquet`).

    Raises:
      ValueError: see `find_hf`; no image or label column.
    """
    return from_tables(f"hf:{where}", open_hf(where), columns)


def open_hf(where: str) -> list[Table]:
    """Returns the tables of a data set, see `load_hf`; ValueError as for `find_hf`."""
    recent = RecentGroups()
    return [
        ParquetTable.open(part, recent) if isinstance(part, Path) else part
        for part in find_hf(where)
    ]


def find_hf(where: str, endings: tuple[str, ...] = ()) -> list[Path | ArrowTable]:
    """Returns the files of a data set, see `load_hf`; what `save_to_disk` wrote is opened.

    Args:
      where: `<owner/name or folder>/<split>`.
      endings: Suffixes of what is taken where the split has no Parquet file. Then the split `train`
        may be files without a split in their names, if no other is named, as on the hub.
    Raises:
      ValueError: nothing there, the hub cannot be reached, no file of a split, or files of it in
        several configurations.
    """
    source = f"hf:{where}"
    place, _, splits = where.rpartition("/")
    if not place or not splits:
        raise expect.InputError(f"{source}: expected hf:<owner/name or folder>/<split>.")
    folder = Path(place).expanduser()
    found: list[Path | ArrowTable] = []
    for split in splits.split("+"):
        if folder.is_dir():
            found += _local(source, folder, split, endings)
        elif expect.is_hub_id(place):
            found += _download(source, place, split, endings)
        else:
            raise expect.InputError(
                f"{source}: no folder {place!r}, and that is no hub id (owner/name) either."
            )
    return found


def _local(
    source: str, folder: Path, split: str, others: tuple[str, ...]
) -> Sequence[Path | ArrowTable]:
    if (folder / split / "state.json").is_file():
        return _saved(source, folder / split, None)
    if (folder / "state.json").is_file():  # one split saved on its own
        return _saved(source, folder, split)
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(_PARQUET + others))
    names = [path.relative_to(folder).as_posix() for path in paths]
    if found := _files_of(source, names, split) or _others_of(source, names, split, others):
        return [folder / name for name in found]
    raise expect.InputError(
        f"{source}: no {_kind(others)} file of split {split!r} in {folder} "
        f"(found {expect.listed(names) or 'none'})."
    )


def _kind(others: tuple[str, ...]) -> str:
    return "Parquet or JSON" if others else "Parquet"


def _saved(source: str, folder: Path, split: str | None) -> list[ArrowTable]:
    """Returns what `save_to_disk` wrote; other Arrow files there are results that it cached."""
    problem = f"{source}: {folder / 'state.json'} does not say which Arrow files are the data"
    kinds = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    with expect.refusing(problem, *kinds, shown=expect.first_line):
        state = json.loads((folder / "state.json").read_bytes())
        names = [file["filename"] for file in state["_data_files"]]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"names the files {names}")
        _refuse_changes(source, folder / "state.json", state)
    held = state.get("_split")
    if split is not None and held not in (None, split):
        raise expect.InputError(f"{source}: {folder} holds the split {held!r}, not {split!r}.")
    return [ArrowTable.open(folder / name) for name in names]


def _refuse_changes(source: str, path: Path, state: dict[str, Any]) -> None:
    """Raises ValueError for changes that `datasets` 1.x makes to the files when it loads them."""
    found = [name for name in ("_indices_data_files", "_indices_files") if state.get(name)]
    if any(file.keys() & {"skip", "take"} for file in state["_data_files"]):
        found.append("skip and take in _data_files")
    if any(step.get("transforms") for step in state.get("_inplace_history") or []):
        found.append("_inplace_history")
    if found:
        raise expect.InputError(
            f"{source}: {path} has {', '.join(found)}: the rows are a selection or a changed "
            "version of the Arrow files, which is not read. Load it with `datasets`, call "
            "flatten_indices() and save it again."
        )


def _files_of(
    source: str, names: Iterable[str], split: str, endings: tuple[str, ...] = _PARQUET
) -> list[str]:
    """Returns the files of a split, in sorted order; ValueError if several data sets have some."""
    ending = "|".join(map(re.escape, endings))
    named = rf"(.*/)?{re.escape(split)}([-.][^/]*|_\d+|/[^/]*)?({ending})"  # it, or its folder
    return _of_one_set(source, [n for n in names if re.fullmatch(named, n, re.DOTALL)], split)


def _others_of(source: str, names: Iterable[str], split: str, others: tuple[str, ...]) -> list[str]:
    """Returns files of the split with other suffixes; or those that the hub takes for `train`."""
    if not others:
        return []
    data = [name for name in names if name.endswith(_PARQUET + others) and _is_data(name)]
    found = _files_of(source, data, split, others)
    if found or split != "train" or any(map(_names_split, data)):
        return found
    # no name says a split: all are `train`
    return _of_one_set(source, [n for n in data if n.endswith(_PARQUET)] or data, split)


def _is_data(name: str) -> bool:
    *_, last = parts = name.split("/")
    return last not in _NO_DATA and not any(part.startswith((".", "__")) for part in parts)


def _names_split(name: str) -> bool:
    return any(map(split_in, re.split(r"[/.]", name)))


def _of_one_set(source: str, found: Sequence[str], split: str) -> list[str]:
    folders = {f"/{name}".rpartition("/")[0].removesuffix(f"/{split}") for name in found}
    if len(folders) > 1:
        shown = expect.listed(repr(folder[1:]) for folder in sorted(folders))
        raise expect.InputError(
            f"{source}: files of split {split!r} are in several folders ({shown}), which may be "
            "configurations of it; expected one. Give a local copy of that folder, as in "
            f"hf:<copy>/<folder>/{split}."
        )
    return sorted(found)


def _download(source: str, repository: str, split: str, others: tuple[str, ...]) -> list[Path]:
    # the hub converts what its owners did not, of most repositories
    tries: list[tuple[str | None, Callable]] = [(None, _files_of), (_CONVERTED, _files_of)]
    if others:
        tries.append((None, functools.partial(_others_of, others=others)))
    with fetching(
        f"{source}: {repository!r} is neither a local folder nor could it be",
        "Without network: on a machine that has it, download "
        f"https://huggingface.co/datasets/{repository} (revision {_CONVERTED} if it has no "
        f"{_kind(others)} files), bring the folder here and give hf:<folder>/<split>.",
    ) as hub:
        from huggingface_hub.errors import RevisionNotFoundError

        for revision, find in tries:
            where = {"repo_type": "dataset", "revision": revision}
            try:
                names = hub.list_repo_files(repository, **where)
            except RevisionNotFoundError:  # it was not converted
                continue
            if found := find(source, names, split):
                return [Path(hub.hf_hub_download(repository, name, **where)) for name in found]
    raise expect.InputError(
        f"{source}: {repository} has no {_kind(others)} file of split {split!r}."
    )
