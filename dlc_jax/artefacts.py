"""What a run leaves on disk: names, formats, and writes that are whole or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlc_jax import checks

CONFIG = "config.json"
PROVENANCE = "provenance.json"
LOSSES = "scores/losses.npz"
SCORES = "scores/scores.parquet"
FEATURES = "scores/features.npz"
TRAINING = "scores/training"
PICTURE = "scores/easiest_hardest.png"
SHARDS = "unfinished"
TUNING = "tuning"
RESULTS = "results.csv"
REPORT = "report"
FINETUNE = "finetune"
EVALUATE = "evaluate"
EXPORTS = "exports"
# Temporary files tell whose they are, so that a later run on the same host can clear those of a
# killed one and leaves everything else alone.
_OWNER, _TEMPORARY = f".dlc_jax-{platform.node()}-", ".tmp"
_ROWS = 8192  # written and read at a time, so that memory does not grow with the data set
_FOLDERS = (
    "",
    "scores",
    TRAINING,
    f"{TRAINING}/*",
    f"{TRAINING}/*/seen",
    f"{SHARDS}/*",
    TUNING,
    f"{TUNING}/*",
    "selections/*",
    f"{FINETUNE}/*/*",
    f"{EVALUATE}/*",
    f"{EXPORTS}/*/*",
    f"{EXPORTS}/idxs*/*/*/*/*",
    REPORT,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredSamples:
    """What `scores/` holds: everything selection needs, without images or encoder."""

    ids: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    scores: dict[str, np.ndarray]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, class names, labels and DLC, which every work directory has."""
        return self.fingerprint_of({"dlc": self.scores["dlc"]})

    def score(self, name: str) -> np.ndarray:
        """Returns a column of scores, [n].

        Raises:
          ValueError: it is not there.
        """
        if name not in self.scores:
            raise checks.InputError(
                f"{SCORES}: has no column {name!r}, only {', '.join(self.scores)}; run the stage "
                "'score' with the same selection.methods and selection.score first."
            )
        return self.scores[name]

    def fingerprint_of(self, arrays: Mapping[str, np.ndarray]) -> str:
        """SHA-256 over ids, class names, labels and these arrays, [n] or [n, d], as float32."""
        digest = hashlib.sha256("\0".join([*self.ids.tolist(), *self.class_names]).encode())
        digest.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name], np.float32).tobytes())
        return digest.hexdigest()


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file that becomes `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}{_OWNER}{os.getpid()}{_TEMPORARY}"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # a full disk says so without naming a file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder that becomes `path` when the block ends, and vanishes if it fails."""
    temporary = path.parent / f".{path.name}{_OWNER}{os.getpid()}{_TEMPORARY}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; a process that ends lets go.

    Raises:
      ValueError: another process is in there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise checks.InputError(f"{folder}: cannot be used: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise checks.InputError(
                f"{folder}: another process is fine-tuning there; wait, or use another folder."
            ) from error
        except OSError:
            pass  # a file system that has no locks
        yield
    finally:
        os.close(handle)


def prepare_workdir(workdir: Path) -> None:
    """Makes the work directory, and clears temporary files of runs that were killed.

    Raises:
      ValueError: it cannot be written to.
    """
    try:
        with atomic(workdir / ".writable") as file:
            file.write(b"")
        (workdir / ".writable").unlink()
    except OSError as error:
        raise checks.InputError(
            f"--workdir: cannot write to {workdir}: {error.strerror or error}."
        ) from error
    for folders in _FOLDERS:
        clear_leftovers(workdir, folders)


def clear_leftovers(root: Path, folders: str = "") -> None:
    """Removes temporary files of processes of this host that are no more; `folders` may be a glob.

    Everything else stays.
    """
    for leftover in root.glob(f"{folders}/.*{_OWNER}*{_TEMPORARY}".lstrip("/")):
        owner = leftover.name.removesuffix(_TEMPORARY).rpartition("-")[2]
        if re.fullmatch(r"[0-9]{1,9}", owner) and not _is_running(int(owner)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    with atomic(path, "w") as file:
        json.dump(value, file, indent=2, default=_plain)
        file.write("\n")


def read_bytes(path: Path) -> bytes:
    """Returns the file's content, nothing if there is no such file."""
    return path.read_bytes() if path.is_file() else b""


def read_json(path: Path) -> Any:
    """Returns the file's value, {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise checks.InputError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise checks.InputError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def json_hash(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """NumPy's numbers, which users' loops hand over, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def write_losses(workdir: Path, **arrays: np.ndarray) -> None:
    """Writes `scores/losses.npz`: losses, sparsity, labels, ids; readable without pickle."""
    with atomic(workdir / LOSSES) as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_scores(workdir: Path, samples: ScoredSamples) -> None:
    """Writes `scores/scores.parquet`: id, label, class_name, one column per scoring method."""
    schema = pa.schema(
        [("id", pa.string()), ("label", pa.int32()), ("class_name", pa.string())]
        + [(name, pa.float32()) for name in samples.scores],
        metadata={"class_names": json.dumps(samples.class_names)},
    )
    names = np.asarray(samples.class_names, dtype=object)
    with atomic(workdir / SCORES) as file, pq.ParquetWriter(file, schema) as table:
        for start in range(0, len(samples.ids), _ROWS):
            some = slice(start, start + _ROWS)
            labels = samples.labels[some]
            columns = [samples.ids[some].tolist(), labels, names[labels]]
            columns += [values[some] for values in samples.scores.values()]
            table.write_batch(
                pa.record_batch(
                    [pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)],
                    schema=schema,
                )
            )


def read_scores(workdir: Path) -> ScoredSamples:
    """Reads `scores/scores.parquet`.

    Raises:
      ValueError: it is not there or not what `write_scores` writes.
    """
    path = workdir / SCORES
    if not path.exists():
        raise checks.InputError(
            f"{path}: not there; run the stage 'score' in this work directory first."
        )
    try:
        with open(path, "rb") as file:  # given a name, Arrow would expand a ~ in it
            table = pq.ParquetFile(file)
            class_names = tuple(json.loads(table.schema_arrow.metadata[b"class_names"]))
            wanted = [name for name in table.schema_arrow.names if name != "class_name"]
            parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
            for batch in table.iter_batches(_ROWS, columns=wanted, use_threads=False):
                for name in wanted:
                    part = batch[name].to_numpy(zero_copy_only=False)
                    parts[name].append(part.astype(np.str_) if name == "id" else part.copy())
        columns = {name: np.concatenate(parts[name]) for name in wanted}
        ids, labels = columns.pop("id"), columns.pop("label")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise checks.InputError(f"{path}: not a table of scores: {error!r}.") from error
    return ScoredSamples(ids, labels, class_names, columns)


def same_arrays(some: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    """Whether both have the same names and values."""
    return some.keys() == others.keys() and all(
        np.array_equal(array, others[name]) for name, array in some.items()
    )


def read_array(workdir: Path, name: str, key: str, samples: ScoredSamples) -> np.ndarray:
    """Reads what a stage left of every sample, [n, ...].

    Raises:
      ValueError: it is not there, cannot be read, or is of other samples.
    """
    path = workdir / name
    if not path.exists():
        raise checks.InputError(
            f"{path}: not there; run the stage 'score' with the same selection.methods first."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            array, ids = file[key], file["ids"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise checks.InputError(f"{path}: cannot be read: {checks.first_line(error)}.") from error
    if not np.array_equal(ids, samples.ids):
        raise checks.InputError(
            f"{path}: is of other samples than {SCORES}; run the stage 'score' again."
        )
    return array


def file_hashes(workdir: Path, paths: list[Path]) -> dict[str, str]:
    """Returns the SHA-256 of each file."""
    hashes = {}
    for path in paths:
        with open(workdir / path, "rb") as file:
            hashes[path.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def are_intact(workdir: Path, hashes: Mapping[str, str | None]) -> bool:
    """Whether every file is there with the content it was written with."""
    paths = [Path(name) for name in hashes]
    present = all((workdir / path).is_file() for path in paths)
    return present and file_hashes(workdir, paths) == hashes
