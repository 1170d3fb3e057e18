"""NumPy files that others may have changed: headers are compared before anything is allocated.

NumPy allocates what a header asks for, and a file of a hundred bytes may ask for 10^15 numbers.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dlc_jax import expect

_READ = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NO_ARRAYS = "cannot be read as arrays"
_KINDS = {"b": "booleans", "f": "floating numbers", "i": "signed integers", "U": "text"}


class Header(NamedTuple):
    """Shape and type of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(path: Path) -> np.ndarray:
    """Reads an `.npy` file.

    Raises:
      ValueError: there is no such file, or it holds something else than one whole array.
    """
    with _reading(path, "not a readable array"), open(path, "rb") as file:
        _header(file, path.stat().st_size)
        return np.load(path, allow_pickle=False)


def read_npz(path: Path, expected: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Reads arrays of an `.npz` file that `numpy.savez` wrote.

    Args:
      path: The file.
      expected: What each array has to be, by name: its kind, `b`, `f`, `i` or `U` as in
        `numpy.dtype.kind`, and its number of axes. Others are not read.
    Raises:
      ValueError: naming file and array; there is no such file, it is damaged or compressed, or an
        array is missing or something else.
    """
    headers = npz_headers(path)
    for name, (kind, ndim) in expected.items():
        if name not in headers:
            raise expect.InputError(
                f"{path}: has no array {name!r}, found {', '.join(headers) or 'none'}."
            )
        shape, dtype = headers[name]
        if dtype.kind != kind or len(shape) != ndim:
            raise expect.InputError(
                f"{path}: {name} is {dtype} {shape}, expected {_KINDS[kind]} with {ndim} axes."
            )
    if sum(headers[name].num_bytes for name in expected) > path.stat().st_size:
        raise expect.InputError(f"{path}: is compressed, expected a file of numpy.savez.")
    return load_npz(path, expected)


def load_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns arrays that `npz_headers` found; ValueError where one is damaged."""
    with _reading(path, _NO_ARRAYS), np.load(path, allow_pickle=False) as file:
        return {name: file[f"{name}.npy"] for name in names}


def npz_headers(path: Path) -> dict[str, Header]:
    """Returns what an `.npz` file says of its arrays, and reads nothing else of them.

    Raises:
      ValueError: there is no such file, it is no archive, an array is there twice, holds Python
        objects, or is not as long as its header says.
    """
    headers: dict[str, Header] = {}
    with _reading(path, _NO_ARRAYS), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                continue  # no array
            if name in headers:
                raise ValueError(f"the array {name!r} is there twice")
            with archive.open(member) as file:
                headers[name] = _header(file, member.file_size, f"{name}: ")
    return headers


def _reading(path: Path, problem: str) -> AbstractContextManager[None]:
    """Refuses what is no regular file, and every error in the block."""
    if not path.is_file():  # a pipe would never end
        raise expect.InputError(f"{path}: not there, or no regular file; expected arrays.")
    # NumPy and zipfile raise anything, as of a header that is no Python
    return expect.refusing(f"{path}: {problem}", Exception, shown=expect.first_line)


def _header(file: io.BufferedIOBase | IO[bytes], num_bytes: int, name: str = "") -> Header:
    """Reads a header; ValueError unless as many bytes follow it as it says."""
    version = np.lib.format.read_magic(file)
    if version not in _READ:
        raise ValueError(f"{name}format {version} of .npy files, expected (1, 0) or (2, 0)")
    shape, _, dtype = _READ[version](file)
    header, rest = Header(shape, dtype), num_bytes - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name}an array of Python objects, which are not loaded")
    if any(size < 0 for size in shape) or not dtype.itemsize or header.num_bytes != rest:
        raise ValueError(
            f"{name}the header says {dtype} {shape}, {header.num_bytes} bytes, but {rest} follow it"
        )
    return header
