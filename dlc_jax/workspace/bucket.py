"""Work directories in a bucket: `--workdir=s3://BUCKET/NAME` or `gs://BUCKET/NAME`.

All work is done in a local copy; what is made whole there is put into the bucket at once, and what
is removed or moved there is removed or moved in the bucket. The bucket is the truth: a run begins
by making the local copy like it, so that it goes on on any machine.

A folder is many objects, so it may be there in part. One that is put or removed is compared with
the checksums in its record, or of its checkpoint, before it is used. Only folders of runs are
moved: their record is copied last and deleted first, so that a folder without it is no run.

The first process does all of this. Others put single files, parts of a measurement, and pull what
they read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dlc_jax import expect
from dlc_jax.distributed import processes
from dlc_jax.files import whole_files
from dlc_jax.workspace import artefacts, lease, records
from dlc_jax.workspace.object_store import ObjectStore

_FILES, _KNOWN = "files", "known.jsonl"
_FETCHED = ".fetched"
# Written for others: may be large, and no stage reads it. Without their records they are written
# again on another machine.
_NOT_FETCHED = (artefacts.EXPORTS, f"{records.FOLDER}/{artefacts.EXPORTS}")


class Held(NamedTuple):
    """An object, and the file that is like it.

    Attributes:
      version: Version of the object.
      size, changed: Size and time of change of the file; None where there is none.
    """

    version: str
    size: int | None = None
    changed: int | None = None


# Noted of an object before it is written, so that it is known if writing fails half-way.
_WRITTEN = Held("")


@contextlib.contextmanager
def work_in(
    workdir: str, say: Callable[[str], None] = print
) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Gives the folder to work in, and what takes the lines meant for the user.

    For a local path that is the path, and `say`. Messages of a bucket name the bucket where those
    who wrote them know only the local copy.

    Args:
      workdir: A path, or the URL of a folder in a bucket.
      say: Takes lines.
    Raises:
      ValueError: the bucket cannot be used, or its local copy is in use.
    """
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", workdir):
        yield Path(workdir).expanduser(), say
        return
    store, home = ObjectStore(workdir), _home(workdir)

    files = home / _FILES
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(whole_files.locked(home))
        except expect.InputError as error:
            raise expect.InputError(f"{store.where}: its local copy {error}") from error
        if not processes.is_first():  # its copy holds no more than parts
            for path in home.iterdir():  # of a run that was killed
                whole_files.remove(path)
            stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.enter_context(whole_files.mirrored_by(Bucket(store, home)))
        try:
            yield files, lambda line: say(line.replace(str(files), store.where))
        except expect.InputError as error:
            error.args = (str(error).replace(str(files), store.where),)
            raise


def _home(url: str) -> Path:
    """Returns where the local copy lies; processes of one machine have one each."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    if not processes.is_first():
        name += f"-{processes.index()}"
    return (Path(base).expanduser() / "dlc_jax" / "workdirs" / name).resolve()


class Bucket:
    """Keeps a place in a bucket and a local copy in step; see `whole_files.Mirror`.

    Args:
      store: The place.
      home: Where the local copy lies, and a list of what it is known to have in common.
    """

    def __init__(self, store: ObjectStore, home: Path):
        self._store, self._files = store, home / _FILES
        self._list = home / _KNOWN
        self._known = _read_known(self._list)
        self._lock = threading.RLock()  # a checkpoint is put while training goes on

    @property
    def lease(self) -> ObjectStore:
        """Where a run of this place keeps its lease."""
        return self._store

    def covers(self, path: Path) -> bool:
        """Whether the path is in the local copy, and no temporary file."""
        return path.is_relative_to(self._files) and not whole_files.is_temporary(path)

    def pull(self, path: Path) -> None:
        """Makes a file or folder like the bucket's."""
        with self._lock:
            name = self._name(path)
            found = self._store.list(name)
            found.pop(lease.FILE, None)
            self._note({known: None for known in _below(self._known, name) if known not in found})
            stale = {known for known in found if not self._is_current(known, found[known])}
            for known in self._local_names(name):
                if known not in found or known in stale:
                    (self._files / known).unlink()
            exported = {known for known in stale if _is_export(known)}
            self._note({known: Held(found[known]) for known in exported})
            for folder, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(folder)
            self._fetch({known: found[known] for known in sorted(stale - exported)})

    def push(self, path: Path) -> None:
        """Puts a file or folder in place of what is there."""
        with self._lock:
            name = self._name(path)
            if path.is_file():
                self._store.put([(name, path)])
                self._note({name: self._held(name, self._store.version(name))})
                return
            names = self._local_names(name)
            links = [known for known in names if (self._files / known).is_symlink()]
            if links:
                raise expect.InputError(f"{self._files / links[0]}: a bucket holds no links.")
            mine = set(names)
            self._delete([known for known in _below(self._known, name) if known not in mine])
            self._note(dict.fromkeys(names, _WRITTEN))
            self._store.put((known, self._files / known) for known in names)
            self._note_all(name)

    def remove(self, path: Path) -> None:
        """Removes a file or folder, if it is there."""
        with self._lock:
            for names in self._of_run(self._name(path)):
                self._delete(names)

    def move(self, source: Path, target: Path) -> None:
        """Moves a file, replacing any at the target, or a run's folder to an empty place."""
        name, to = self._name(source), self._name(target)
        with self._lock:
            record, others = self._of_run(name)
            moved = {known: to + known.removeprefix(name) for known in [*others, *record]}
            self._note(dict.fromkeys(moved.values(), _WRITTEN))
            for names in (others, record):
                self._store.copy((known, moved[known]) for known in names)
            for names in (record, others):
                self._delete(names)
            if moved:
                self._note_all(to)

    def _of_run(self, name: str) -> tuple[list[str], list[str]]:
        """Splits what is known below a name into the record of the run there, and the others."""
        names, record = _below(self._known, name), f"{name}/{records.file_of(records.RUN)}"
        return [known for known in names if known == record], [n for n in names if n != record]

    def _note_all(self, name: str) -> None:
        """Notes every object at or below this name as equal to its local file."""
        found = self._store.list(name)
        self._note({known: self._held(known, version) for known, version in found.items()})

    def _fetch(self, versions: dict[str, str]) -> None:
        temporary = {name: self._files / (name + _FETCHED) for name in versions}
        for path in temporary.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._store.fetch(temporary.items())
        except OSError as error:
            if error.filename is not None:
                raise
            # a full disk says so without naming a file
            raise OSError(error.errno, error.strerror, str(self._files)) from error
        for name, path in temporary.items():
            os.replace(path, self._files / name)
            self._note({name: self._held(name, versions[name])})

    def _delete(self, names: list[str]) -> None:
        self._store.delete(names)
        self._note(dict.fromkeys(names))

    def _is_current(self, name: str, version: str) -> bool:
        """Whether the file is like this version of the object."""
        found = self._held(name, version)
        is_enough = found.size is not None or _is_export(name)
        return self._known.get(name) == found and is_enough

    def _held(self, name: str, version: str) -> Held:
        """Returns what to note of an object that the file, if there is one, is like."""
        with contextlib.suppress(FileNotFoundError):
            stat = (self._files / name).stat()
            return Held(version, stat.st_size, stat.st_mtime_ns)
        return Held(version)

    def _note(self, found: Mapping[str, Held | None]) -> None:
        """Notes objects and their files, or that there are none."""
        with open(self._list, "a") as file:
            for name, held in found.items():
                self._known.pop(name, None)
                if held is not None:
                    self._known[name] = held
                file.write(json.dumps([name, held]) + "\n")

    def _name(self, path: Path) -> str:
        name = path.relative_to(self._files).as_posix()
        return "" if name == "." else name

    def _local_names(self, name: str) -> list[str]:
        path = self._files / name
        if path.is_file():
            return [name]
        walk = os.walk(path)
        return sorted(self._name(Path(root) / file) for root, _, files in walk for file in files)


def _read_known(path: Path) -> dict[str, Held]:
    """Reads what `_note` wrote, and writes it anew without what was superseded."""
    noted: dict[str, list | None] = {}
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a kill may have cut the last one off
                noted.update([json.loads(line)])
    known = {name: Held(*held) for name, held in noted.items() if held is not None}
    if known:
        with whole_files.atomic(path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in known.items())
    return known


def _is_export(name: str) -> bool:
    return any(_below([name], folder) for folder in _NOT_FETCHED)


def _below(names: Iterable[str], name: str) -> list[str]:
    """Returns those called so or below it; all for no name."""
    if not name:
        return list(names)
    return [known for known in names if known == name or known.startswith(f"{name}/")]
