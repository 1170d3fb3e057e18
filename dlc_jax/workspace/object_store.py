"""Objects below one place of a bucket, through fsspec: listed, fetched, put, copied and deleted.

An object is put whole or not at all. fsspec's file systems try again what fails in passing; where
the bucket was reached before, this goes on trying for as long as `_PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from dlc_jax import expect

EXTRA = "pip install 'dlc_jax[bucket]'"
_OF_EXTRA = ("s3", "s3a", "gs", "gcs")
_PATIENCE_S = 120.0
_LONGEST_WAIT_S = 15.0
_AT_ONCE = 16
_SETTLE_S = 2.0  # for others that create an object at the same moment
# What tells one version of an object from another: the first of these that a file system gives.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
# Classes of errors that may pass, of Python, aiohttp, requests, botocore and google.auth; by name,
# as nobody has all of these packages.
_PASSING = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "TransportError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
}
_PASSING_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.EINTR}
_OWN_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
Value = TypeVar("Value")


class Unreachable(BaseException):
    """The bucket is not there any more. No `Exception`: nothing on the way should go on after it.

    Results in the bucket are valid or known to be incomplete, so the same command can resume.
    """


class ObjectStore:
    """What lies below a URL such as `s3://bucket/runs/demo`, by the name below it.

    Args:
      url: URL of a folder in a bucket.
    Attributes:
      where: The URL, for messages.
    Raises:
      ValueError: not such a URL, or its protocol needs a package that is not there.
    """

    def __init__(self, url: str):
        self.where = url.rstrip("/")
        try:
            import fsspec

            # others may write there, so that nothing may be remembered
            self._files, self._root = fsspec.core.url_to_fs(
                self.where, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            protocol = url.partition("://")[0]
            install = f"{EXTRA} ({error})" if protocol in _OF_EXTRA else str(error)
            raise expect.InputError(
                f"--workdir: {protocol}:// needs a package that is not installed: {install}."
            ) from error
        except Exception as error:  # of credentials, for one
            raise expect.InputError(f"--workdir: {url}: {expect.first_line(error)}.") from error
        if "/" not in self._root.strip("/"):
            raise expect.InputError(
                f"--workdir: expected a folder in a bucket, such as {self.where}/runs/demo, got "
                f"{url!r}."
            )
        self._was_reached = False

    def list(self, name: str = "") -> dict[str, str]:
        """Returns the objects called so or below it, and their versions."""

        def look() -> dict[str, Any]:
            try:
                return self._files.find(self._path(name), detail=True)
            except FileNotFoundError as error:
                raise expect.InputError(f"{self.where}: there is no such bucket.") from error

        start = len(self._root.rstrip("/")) + 1
        found = self._patiently("be listed", look)
        return {
            path[start:]: _version(info)
            for path, info in found.items()
            if info["type"] == "file" and not path.endswith("/")
        }

    def version(self, name: str) -> str:
        """Returns that of an object."""
        info = self._patiently("be looked at", lambda: self._files.info(self._path(name)), name)
        return _version(info)

    def read(self, name: str) -> bytes | None:
        """Returns an object's content; None if there is no such object."""

        def look() -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return self._files.cat_file(self._path(name))
            return None

        return self._patiently("be read", look, name)

    def create(self, name: str, content: bytes) -> bool:
        """Puts an object unless there is one of this name; returns whether it has this content.

        Not every bucket can do both at once, so that it is read again a little later.
        """

        def put() -> bool:
            with contextlib.suppress(FileExistsError):
                self._files.pipe_file(self._path(name), content, mode="create")
                return True
            return False

        if name not in self.list(name) and self._patiently("be written", put, name):
            time.sleep(_SETTLE_S)  # where two can create it, the last one has it
        return self.read(name) == content  # also where the answer of an earlier try was lost

    def write(self, name: str, content: bytes) -> None:
        """Puts an object with this content."""
        pipe = self._files.pipe_file
        self._each("be written", lambda name: pipe(self._path(name), content), [(name,)])

    def fetch(self, places: Iterable[tuple[str, Path]]) -> None:
        """Fetches objects to files."""
        get = self._files.get_file
        self._each("be read", lambda name, file: get(self._path(name), str(file)), places)

    def put(self, places: Iterable[tuple[str, Path]]) -> None:
        """Puts files as objects."""
        put = self._files.put_file
        self._each("be written", lambda name, file: put(str(file), self._path(name)), places)

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copies objects, each from its first to its second name."""
        copy = self._files.cp_file
        self._each("be written", lambda one, two: copy(self._path(one), self._path(two)), pairs)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, if they are there."""

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

        self._each("be deleted", one, ((name,) for name in names))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _each(self, what: str, do: Callable[..., None], items: Iterable[tuple]) -> None:
        """Does it with the values of every item, several at once; again with those that failed.

        Nothing is on its way any more when this ends, also if a signal ends it.
        """
        left = dict.fromkeys(items)

        def some() -> None:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                futures = {pool.submit(do, *item): item for item in left}
                try:
                    for future in as_completed(futures):
                        future.result()
                        del left[futures[future]]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

        self._patiently(what, some)

    def _patiently(self, what: str, do: Callable[[], Value], name: str = "") -> Value:
        """Calls `do`; retries errors that may pass, if the bucket was reached before."""
        import tenacity  # which a local work directory does without

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_delay(_PATIENCE_S if self._was_reached else 0.0),
            wait=tenacity.wait_exponential(max=_LONGEST_WAIT_S),
            reraise=True,
        )
        try:
            value = again(do)
        except Exception as error:
            if isinstance(error, expect.InputError) or _is_of_own_disk(error):
                raise
            place = f"{self.where}/{name}".rstrip("/")
            message = f"{place}: cannot {what}: {_reason(error)}."
            if _may_pass(error) and self._was_reached:
                raise Unreachable(message) from error
            raise expect.InputError(message) from error
        self._was_reached = True
        return value


def _version(info: dict[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), "")


def _may_pass(error: BaseException) -> bool:
    if not isinstance(error, Exception) or _is_of_own_disk(error):
        return False
    code = str(getattr(error, "code", None))  # of gcsfs, a number or text
    is_busy = code in ("408", "429") or code.startswith("5")
    is_interrupted = isinstance(error, OSError) and error.errno in _PASSING_ERRNO
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return is_busy or is_interrupted or not _PASSING.isdisjoint(kinds)


def _is_of_own_disk(error: BaseException) -> bool:
    """Whether it is about the local copy: a full disk, or a file that cannot be opened."""
    return isinstance(error, OSError) and (
        error.errno in _OWN_DISK or os.path.isabs(error.filename or "")
    )


def _reason(error: BaseException) -> str:
    said = expect.first_line(error).rstrip(".")
    is_refused = isinstance(error, PermissionError) or str(getattr(error, "code", "")) == "401"
    if is_refused or re.search("CredentialsError|Forbidden", said):
        said += " (expected the credentials that the cloud's own tools use, with access to it)"
    return said
