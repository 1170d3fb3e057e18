"""The safetensors files of a Hugging Face model folder, and what their headers say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dlc_jax import checks
from dlc_jax.encoders.weights import opened
from dlc_jax.files.json_files import NAME, read_json

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_SHARD = re.compile(r"[^/\\\0]+")  # a file of the folder
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_BYTES_AT_ONCE = 64 * 2**20  # of a tensor that is compared


class StoredTensor(NamedTuple):
    """Where a tensor is, and its shape as torch has it."""

    file: Path
    shape: tuple[int, ...]


def has_weights(folder: Path) -> bool:
    """Whether the folder has weights, and not only a configuration."""
    return (folder / _WHOLE).is_file() or (folder / _INDEX).is_file()


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of the weights that transformers loads, by tensor name.

    `model.safetensors` is used where it is there, and otherwise the shards of the index.

    Raises:
      ValueError: neither is there, a damaged index, a shard that is missing or does not hold what
        the index says, tensors that are not floating-point, such as those of a quantised model.
    """
    if (folder / _WHOLE).is_file():
        return headers(folder / _WHOLE)
    index = folder / _INDEX
    if not index.is_file():
        raise checks.InputError(f"{folder}: neither {_WHOLE} nor {_INDEX} is there.")
    table = read_json(index, {"weight_map": {NAME: _SHARD}})["weight_map"]
    shards = sorted(set(table.values()))
    if lost := [name for name in shards if not (folder / name).is_file()]:
        shown = checks.listed(lost)
        raise checks.InputError(f"{folder}: shards that {_INDEX} names are missing: {shown}.")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        there = headers(folder / shard)
        listed = {name for name, file in table.items() if file == shard}
        if wrong := sorted(listed ^ there.keys()):
            raise checks.InputError(
                f"{folder / shard}: does not hold what {_INDEX} says; they disagree about "
                f"{checks.listed(wrong)}."
            )
        found |= there
    return found


def headers(path: Path) -> dict[str, StoredTensor]:
    """Reads names and shapes of a file's tensors; ValueError where one is not floating-point."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, some in slices.items():
            if some.get_dtype() not in _FLOATS:
                raise checks.InputError(
                    f"{path}: {name} is {some.get_dtype()}; expected {', '.join(_FLOATS)}, that "
                    "is, weights that are not quantised."
                )
        return {name: StoredTensor(path, tuple(s.get_shape())) for name, s in slices.items()}


def read_tensor(file: Any, name: str) -> np.ndarray:
    """Reads a tensor of an opened file to the host."""
    with _on_host():
        return np.asarray(file.get_tensor(name))


def _on_host() -> AbstractContextManager:
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def are_equal(tensors: Mapping[str, StoredTensor], names: tuple[str, str]) -> bool:
    """Whether two tensors, [rows, columns], have the same values; reads some rows at a time."""
    one, other = (tensors[name] for name in names)
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    step = max(1, _BYTES_AT_ONCE // (4 * max(1, one.shape[1])))
    with opened(one.file) as file, opened(other.file) as other_file, _on_host():
        this, that = file.get_slice(names[0]), other_file.get_slice(names[1])
        starts = range(0, one.shape[0], step)
        some = [slice(start, min(start + step, one.shape[0])) for start in starts]
        return all(np.array_equal(np.asarray(this[r]), np.asarray(that[r])) for r in some)


def num_blocks(names: Iterable[str]) -> int:
    """Returns how many blocks have tensors."""
    parts = (name.split(".") for name in names)
    return len({part[2] for part in parts if part[:2] == ["model", "layers"] and len(part) > 2})
