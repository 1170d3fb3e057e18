"""Decoded evaluation crops on disk: content-addressed, memory-mapped, bounded, shared by runs.

    <folder>/<key>/pixels.raw    uint8 [n, s, s, 3], a row of zeros for an unreadable image
    <folder>/<key>/entry.json    shape, unreadable images, a checksum per block of rows; with a
                                 checksum of all this and of the key
    <folder>/<key>.lock          held by the process that fills the entry

The key is a hash of the data set's content, the transform and the decoder's version, so an entry is
never out of date. A process that uses an entry holds a shared lock on its entry.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dlc_jax import expect
from dlc_jax.files.json_files import SHA256, parse_json
from dlc_jax.preprocess.decode import in_order
from dlc_jax.preprocess.transform import PAPER, Transform
from dlc_jax.types import Dataset, setting
from dlc_jax.workspace import artefacts
from dlc_jax.workspace.artefacts import decoder, json_hash

_GIB = 2**30
_BLOCK = 64  # rows per checksum
_INDEX = {
    "shape": [int, int],
    "problems": {re.compile("0|[1-9][0-9]{0,17}"): str},
    "checksums": [int],
    "sha256": SHA256,
}
Decode = Callable[[], Iterable[np.ndarray | str]]  # every crop, or why it cannot be had


class CachedCrops(NamedTuple):
    """One entry, opened.

    Attributes:
      pixels: Mapped from disk, read-only.
      problems: Why there is nothing at a position.
      held: What keeps other processes from removing the entry.
    """

    pixels: UInt8[np.ndarray, "n s s 3"]
    problems: dict[int, str]
    held: IO


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Keeps decoded evaluation crops, so that images are decoded once for all runs.

    Attributes:
      folder: Where; None: `dlc_jax` in $XDG_CACHE_HOME or ~/.cache. Several processes may use it.
      max_gib: Most gibibytes it may hold; what was not used for longest makes room. 0 turns it
        off, and a data set that alone is larger is not kept.
    Raises:
      ValueError: max_gib is negative or not finite.
    """

    folder: str | None = setting(None, "of decoded images; None: dlc_jax in the user's cache")
    max_gib: float = setting(10.0, "most it may hold; 0 turns it off, images are decoded twice")

    def __post_init__(self) -> None:
        expect.number("cache.max_gib", self.max_gib)
        if not math.isfinite(self.max_gib):
            raise expect.InputError(
                f"cache.max_gib: expected a finite number of gibibytes, got {self.max_gib}."
            )
        expect.at_least("cache.max_gib", self.max_gib, 0)

    @property
    def path(self) -> Path:
        """Where the entries are."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = f"{base}/dlc_jax" if self.folder is None else self.folder
        return Path(folder).expanduser()

    def takes(self, num_images: int, image_size: int) -> bool:
        """Whether that many images of that size may be kept at all."""
        return 0 < num_images * image_size**2 * 3 <= self.max_gib * _GIB

    def crops(
        self,
        dataset: Dataset,
        part: range,
        image_size: int,
        decode_all: Decode,
        transform: Transform = PAPER,
    ) -> CachedCrops | None:
        """Returns a data set's crops, decoded now unless they are there already.

        Args:
          dataset: What they are of.
          part: Positions in it.
          image_size: Side of the crops in pixels.
          decode_all: Gives every crop of the part, or why it cannot be had, in order.
          transform: What `decode_all` prepares them with.
        Returns:
          The crops, or None if there is no room for them.
        Raises:
          ValueError: the folder cannot be written to, or its disk is full.
        """
        if not self.takes(len(part), image_size):
            return None
        entry = self.path / _key(dataset, image_size, part, transform)
        problem = f"cache.folder: {self.path} cannot be used"
        end = (
            "; expected a folder to write to with room for the decoded images. cache.max_gib=0 "
            "does without."
        )
        with expect.refusing(problem, OSError, shown=expect.reason, end=end):
            artefacts.clear_leftovers(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            with _alone(entry.with_suffix(".lock")):  # another run may be decoding the same
                found = _opened(entry, len(part), image_size)
                if found is None:
                    artefacts.remove(entry)  # damaged
                    if self._write(entry, len(part), image_size, decode_all):
                        found = _opened(entry, len(part), image_size)
                return found

    def _write(self, entry: Path, num_images: int, image_size: int, decode_all: Decode) -> bool:
        """Decodes everything into a new entry; False if there is no room for it."""
        num_bytes = num_images * image_size**2 * 3
        with contextlib.ExitStack() as stack:
            with _alone(self.path / ".lock"):
                if not self._make_room(num_bytes):
                    return False
                folder = stack.enter_context(artefacts.atomic_folder(entry))
                file = stack.enter_context(open(folder / "pixels.raw", "wb"))
                file.truncate(num_bytes)  # counts from now on for others that make room
            problems: dict[str, str] = {}
            checksums: list[int] = []
            for position, crop in enumerate(decode_all()):
                if isinstance(crop, str):
                    problems[str(position)] = crop
                    crop = np.zeros((image_size, image_size, 3), np.uint8)
                if position % _BLOCK == 0:
                    checksums.append(0)
                row = np.ascontiguousarray(crop)
                file.write(row.data)
                checksums[-1] = zlib.crc32(row.data, checksums[-1])
            file.flush()
            os.fsync(file.fileno())
            file.close()
            shape = [num_images, image_size]
            index = {"shape": shape, "problems": problems, "checksums": checksums}
            sha256 = json_hash([entry.name, index])
            artefacts.write_json(folder / "entry.json", {**index, "sha256": sha256})
        return True

    def _make_room(self, num_bytes: int) -> bool:
        """Removes what was not used for longest until so much more fits; False if it cannot."""
        sizes, used = {}, {}
        for folder in self.path.iterdir():
            with contextlib.suppress(OSError):  # others may be finishing, or giving up, theirs
                sizes[folder] = (folder / "pixels.raw").stat().st_size
                if not folder.name.startswith("."):  # finished
                    used[folder] = (folder / "entry.json").stat().st_mtime
        excess = sum(sizes.values()) + num_bytes - self.max_gib * _GIB
        for folder in sorted(used, key=lambda folder: used[folder]):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError), open(folder / "entry.json") as held:
                if not _locked(held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    continue  # somebody reads it
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_suffix(".lock").unlink(missing_ok=True)
            excess -= sizes[folder]
        return excess <= 0


def _key(
    dataset: Dataset, image_size: int, part: range | None = None, transform: Transform = PAPER
) -> str:
    of: dict[str, Any] = {
        "dataset": dataset.fingerprint,
        "transform": transform.described(image_size),
        "decoder": decoder(),
    }
    if part not in (None, range(len(dataset))):
        of["part"] = [part.start, part.stop]
    return json_hash(of)[:32]


def _opened(entry: Path, num_images: int, image_size: int) -> CachedCrops | None:
    """Returns the entry with all its checksums compared; None if it is not there or damaged."""
    if not (entry / "entry.json").is_file():  # a pipe would never end
        return None
    held = open(entry / "entry.json")  # noqa: SIM115 - open, and locked, while in use
    _locked(held, fcntl.LOCK_SH)
    shape = (num_images, image_size, image_size, 3)
    try:
        facts = parse_json(held.read(), _INDEX, entry / "entry.json")
        problems = {int(position): why for position, why in facts["problems"].items()}
        if (
            facts.pop("sha256") != json_hash([entry.name, facts])
            or facts["shape"] != [num_images, image_size]
            or not all(position < num_images for position in problems)
            or (entry / "pixels.raw").stat().st_size != math.prod(shape)
        ):
            return None
        pixels = np.memmap(entry / "pixels.raw", np.uint8, "r", shape=shape)
        starts = range(0, len(pixels), _BLOCK)
        sums = in_order(lambda i: zlib.crc32(pixels[starts[i] :][:_BLOCK].data), len(starts))
        if list(sums) != facts["checksums"]:
            return None
    except (OSError, ValueError):
        return None
    os.utime(entry / "entry.json")
    return CachedCrops(pixels, problems, held)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in here for the same path."""
    with open(path, "a") as file:
        _locked(file, fcntl.LOCK_EX)
        yield


def _locked(file: IO[Any], how: int) -> bool:
    """Locks an open file until it is closed; False if others hold it and `how` is not to wait."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks: entries are still whole or not there
        pass
    return True
