"""Files and folders that are whole or not there at all, and what keeps others like them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from dlc_jax import expect

# Temporary files tell whose they are, so that a later run on the same host can clear those of a
# killed one and leaves everything else alone.
_PACKAGE, _TEMPORARY = ".dlc_jax-", ".tmp"
_OWNER = f"{_PACKAGE}{platform.node()}-"


@runtime_checkable
class Mirror(Protocol):
    """Keeps something else, such as a bucket, like a work directory."""

    @property
    def lease(self) -> Any:
        """Where a run keeps its lease of it; see `lease.LeasePlace`."""

    def covers(self, path: Path, /) -> bool:
        """Whether it is about this path."""

    def pull(self, path: Path, /) -> None:
        """Makes a file or folder as it is there."""

    def push(self, path: Path, /) -> None:
        """Makes it as the file or folder is here."""

    def remove(self, path: Path, /) -> None:
        """Removes there what was removed here."""

    def move(self, source: Path, target: Path, /) -> None:
        """Moves there what was moved here."""


_mirror: Mirror | None = None  # none for a work directory that is nowhere else
_check: Callable[[], None] | None = None


@contextlib.contextmanager
def guarded_by(check: Callable[[], None]) -> Iterator[None]:
    """Calls `check`, which may raise, before anything is written, removed or moved in here."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


def _check_may_write() -> None:
    if _check is not None:
        _check()


@contextlib.contextmanager
def mirrored_by(mirror: Mirror) -> Iterator[None]:
    """Has the mirror follow all that is written, removed and moved in here."""
    global _mirror
    _mirror = mirror
    try:
        yield
    finally:
        _mirror = None


def is_mirrored(path: Path) -> bool:
    """Whether what is written there goes elsewhere as well."""
    return mirror_of(path) is not None


def mirror_of(path: Path) -> Mirror | None:
    """Returns the mirror that covers this path; None if none does."""
    return _mirror if _mirror is not None and _mirror.covers(path) else None


def pull(path: Path) -> None:
    """Makes a file or folder as other processes left it, where they do not share this one."""
    if mirror := mirror_of(path):
        mirror.pull(path)


def push(path: Path) -> None:
    """Gives a file or folder, whole by now, to whoever does not share this one."""
    _check_may_write()
    if mirror := mirror_of(path):
        mirror.push(path)


def remove(path: Path) -> None:
    """Deletes a file or folder, if it is there."""
    _check_may_write()
    _delete(path, ignore_errors=True)
    if mirror := mirror_of(path):
        mirror.remove(path)


def move(source: Path, target: Path) -> None:
    """Moves a file, or a folder to where none is."""
    _check_may_write()
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    if mirror := mirror_of(target):
        mirror.move(source, target)


def _delete(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file that becomes `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_may_write()
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # a full disk says so without naming a file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    push(path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder that becomes `path` when the block ends, and vanishes if it fails."""
    temporary = temporary_of(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _check_may_write()
        _delete(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    push(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; a process that ends lets go.

    Raises:
      ValueError: another process is in there, or the folder cannot be made.
    """
    with expect.refusing(f"{folder}: cannot be used", OSError, shown=expect.reason):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise expect.InputError(
                f"{folder}: another process is running there; wait, or use another folder."
            ) from error
        except OSError:
            pass  # a file system that has no locks
        yield
    finally:
        os.close(handle)


def clear_leftovers(root: Path, folders: str = "", *, everyones: bool = False) -> None:
    """Removes temporary files of processes of this host that are no more; `folders` may be a glob.

    Everything else stays. `everyones` removes those of all processes, where none can be at work.
    """
    owners = _PACKAGE if everyones else _OWNER
    for leftover in root.glob(f"{folders}/.*{owners}*{_TEMPORARY}".lstrip("/")):
        owner = leftover.name.removesuffix(_TEMPORARY).rpartition("-")[2]
        if everyones or (re.fullmatch(r"[0-9]{1,9}", owner) and not is_running(int(owner))):
            _delete(leftover, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """Returns where this process writes what becomes `path` when it is whole."""
    return path.parent / f".{path.name}{_OWNER}{os.getpid()}{_TEMPORARY}"


def is_temporary(path: Path) -> bool:
    """Whether it is, or is in, what becomes a file or folder when it is whole."""
    return any(_OWNER in part and part.endswith(_TEMPORARY) for part in path.parts)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
