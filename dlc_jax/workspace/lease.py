"""One run at a time in a work directory: a lease that the first process of a run holds and renews.

The lease is a file, or an object of a bucket, that names its holder and counts its renewals. It is
void as soon as its holder is known to be dead, which only the same machine can know, and after a
minute in which it did not change. Clocks of different machines are not compared.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dlc_jax import expect
from dlc_jax.files import whole_files
from dlc_jax.workspace import artefacts
from dlc_jax.workspace.object_store import ObjectStore

FILE = ".lease.json"
_RENEW_S, _VOID_S = 10.0, 60.0
# Without a renewal for so long, nothing is written before the lease was read again.
_DOUBT_S = 30.0
_LOOK_S = 0.5
_SETTLE_S = 0.5  # for others that take a void lease at the same moment


class Lost(BaseException):
    """Another run holds the work directory. No `Exception`: nothing should go on after it."""


class Folder(NamedTuple):
    """A folder of a file system, with what a lease needs: a part of `ObjectStore`'s methods.

    Attributes:
      where: What the user calls it: its path.
    """

    where: str

    def read(self, name: str) -> bytes | None:
        """Returns a file's content; None if there is no such file."""
        with contextlib.suppress(FileNotFoundError):
            return self._path(name).read_bytes()
        return None

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file whole, unless there is one of this name; returns whether it did."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._written(name, content) as temporary, contextlib.suppress(FileExistsError):
            try:
                os.link(temporary, path)  # unlike a new file, whole from its first moment
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with open(path, "xb") as file:
                    file.write(content)
            return True
        return False

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole, whether or not there is one."""
        with self._written(name, content) as temporary:
            os.replace(temporary, self._path(name))

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files, if they are there."""
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def age_s(self, name: str) -> float:
        """Returns how long a file has not changed, as far as that can be known at once.

        By the clock of the file system, which also dates a file that is written now.
        """
        with self._written(name, b"") as temporary, contextlib.suppress(FileNotFoundError):
            return temporary.stat().st_mtime - self._path(name).stat().st_mtime
        return 0.0

    def _path(self, name: str) -> Path:
        return Path(self.where) / name

    @contextlib.contextmanager
    def _written(self, name: str, content: bytes) -> Iterator[Path]:
        # two containers may have the same host name and process number
        temporary = whole_files.temporary_of(self._path(f"{name}.{uuid.uuid4().hex}"))
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


LeasePlace: TypeAlias = Folder | ObjectStore


def place_of(workdir: Path) -> LeasePlace:
    """Returns where the lease of a work directory is: in it, or in the bucket that it is like."""
    mirror = whole_files.mirror_of(workdir)
    return Folder(str(workdir)) if mirror is None else mirror.lease


@contextlib.contextmanager
def held(
    place: LeasePlace, say: Callable[[str], None] = print, option: str = "--workdir"
) -> Iterator[None]:
    """Holds the lease of a work directory in here, and lets nothing be written without it.

    Waits up to a minute for a lease that shows no sign of life; its holder may have died.

    Args:
      place: Where the lease is.
      say: Takes a line if this has to wait.
      option: Name of the option that gave the place, for messages.
    Raises:
      ValueError: another run holds it, or it cannot be written.
      Lost: from a write in here, if another run took the lease because this process was suspended
        for more than a minute.
    """
    lease = _Lease(place, option)
    with artefacts.refusing_to_write(place.where, option):
        lease.acquire(say)
    thread = threading.Thread(target=lease.keep, name="lease", daemon=True)
    thread.start()
    try:
        with whole_files.guarded_by(lease.check):
            yield
    finally:
        lease.ended.set()
        thread.join(timeout=_RENEW_S)
        lease.release()


class _Lease:
    """The lease of this process, and what it knows of another's."""

    def __init__(self, place: LeasePlace, option: str):
        self._option = option
        self._place, self._token, self._renewals = place, uuid.uuid4().hex, 0
        self._since = _now()
        self._sure_at = _clock()  # when it was last known to be ours
        self._lock = threading.Lock()  # of two threads that renew
        self._taken_by: str | None = None
        self.ended = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Takes the lease, from nobody or from a holder that is dead or silent."""
        if self._place.create(FILE, self._content()):
            return
        last = self._place.read(FILE)
        # the dates of objects are not to be compared with any clock here
        age_s = self._place.age_s(FILE) if isinstance(self._place, Folder) else 0.0
        # whatever the file's date says, one that lives is given the time to show it
        silent_s = min(max(0.0, age_s), _VOID_S - 1.5 * _RENEW_S)
        seen_at, said = _clock() - silent_s, False
        while last is not None and _lives(last) is not False and _clock() - seen_at < _VOID_S:
            if _lives(last) and _clock() - seen_at < 2 * _RENEW_S:
                raise expect.InputError(self._refusal(last))
            if not said:
                left_s = _VOID_S - (_clock() - seen_at)
                say(f"{self._place.where}: {_who(last)}; waiting {left_s:.0f} s for a sign of life")
                said = True
            time.sleep(_LOOK_S)
            found = self._place.read(FILE)
            if found is not None and found != last:
                raise expect.InputError(self._refusal(found))
            last = found
        self._take(last)

    def _take(self, void: bytes | None) -> None:
        """Takes a lease that is void or gone, unless another process is faster."""
        if void is None:
            self._place.create(FILE, self._content())
        elif self._place.read(FILE) == void:
            self._place.write(FILE, self._content())
            time.sleep(_SETTLE_S)
        found = self._place.read(FILE)
        if _facts(found).get("token") != self._token:
            raise expect.InputError(self._refusal(found))
        self._sure_at = _clock()

    def keep(self) -> None:
        """Renews the lease until it ends or is lost."""
        while self._taken_by is None and not self.ended.wait(_RENEW_S):
            with contextlib.suppress(BaseException):  # `check` meets what does not pass
                self._renew()

    def check(self) -> None:
        """Raises `Lost` unless the lease is ours, so that something can be written."""
        if self._taken_by is None and _clock() - self._sure_at > _DOUBT_S:
            self._renew()
        if self._taken_by is not None:
            raise Lost(
                f"{self._place.where}: {self._taken_by}: this process gave no sign of life for too "
                "long. It writes nothing more."
            )

    def release(self) -> None:
        """Deletes the lease, if it is ours."""
        with contextlib.suppress(Exception), self._lock:
            if _facts(self._place.read(FILE)).get("token") == self._token:
                self._place.delete([FILE])

    def _renew(self) -> None:
        with self._lock:
            found = self._place.read(FILE)
            if found is None and _clock() - self._sure_at > _DOUBT_S:
                self._taken_by = "another run may have held it meanwhile, and ended"
            # else one that is gone was deleted by hand, and is written again
            elif found is not None and _facts(found).get("token") != self._token:
                self._taken_by = _who(found)
            elif not self.ended.is_set():
                self._renewals += 1
                self._place.write(FILE, self._content())
                self._sure_at = _clock()

    def _content(self) -> bytes:
        facts = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": self._since,
            "machine": _machine(),
            "started": _started(os.getpid()),
            "token": self._token,
            "renewals": self._renewals,
            "renewed": _now(),
        }
        return (json.dumps(facts, indent=2) + "\n").encode()

    def _refusal(self, content: bytes | None) -> str:
        return (
            f"{self._place.where}: in use: {_who(content)}. One run at a time may work there; wait "
            f"until it ends, or use another {self._option}."
        )


def _facts(content: bytes | None) -> dict[str, Any]:
    """Returns what a lease says; nothing of one that cannot be read."""
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(content or b"")
        if isinstance(facts, dict):
            return facts
    return {}


def _who(content: bytes | None) -> str:
    facts = _facts(content)
    if not {"pid", "host", "since"} <= facts.keys():
        return "an unknown process holds its lease"
    return f"process {facts['pid']} on {facts['host']} holds it since {facts['since']}"


def _lives(content: bytes) -> bool | None:
    """Whether the holder, which ran on this machine, still does; None: it cannot be looked at."""
    facts = _facts(content)
    is_here = facts.get("host") == platform.node() and facts.get("machine") == _machine()
    names_process = type(facts.get("pid")) is int and isinstance(facts.get("started"), str)
    return _started(facts["pid"]) == facts["started"] if is_here and names_process else None


def _started(pid: int) -> str | None:
    """Returns when a process started, by which numbers used twice differ; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return "running" if whole_files.is_running(pid) else None  # no /proc
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _machine() -> str:
    """Returns what differs between hosts of the same name, and between containers on one."""
    found = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        found += re.findall("[0-9]+", os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _clock() -> float:
    """Returns seconds, in which those of a machine that sleeps count."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
