"""Keys of results: hashes of everything that decides them, and versions recorded beside them.

The package's version has no part in it. Each kind of result has a number, which is raised whenever
the same settings would give other bytes; `tests/golden/test_result_numbers.py` notices where they
do.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from importlib import metadata
from typing import Any

import jax
import numpy as np
import PIL
from PIL import features

from dlc_jax.version import __version__

# Result numbers above 1, by kind of result; every other kind has number 1.
RESULT_NUMBERS: dict[str, int] = {}
# Kinds that can be made again from other results: they are replaced, not set aside.
DERIVED = ("scores", "export", "report")
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
)


def result_number(kind: str) -> int:
    """Returns the result number of a kind of result."""
    return RESULT_NUMBERS.get(kind, 1)


def key_of(kind: str, decisive: Any) -> str:
    """Returns the SHA-256 of what decides a result, and of the number of its kind.

    Args:
      kind: Kind of result.
      decisive: Everything that decides the result, as JSON has it; names in any order.
    """
    return json_hash([kind, result_number(kind), decisive])


def json_hash(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Returns NumPy's numbers, which users' loops hand over, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def machine() -> list[str]:
    """Returns what decides the bytes of unfinished parts, besides their settings."""
    device = jax.devices()[0]
    return [jax.__version__, device.platform, device.device_kind]


def decoder() -> list[str | None]:
    """Returns what decides the pixels of decoded images: the versions of Pillow and of its JPEG."""
    return [PIL.__version__, features.version("jpg")]


@functools.cache
def devices() -> list[str]:
    """Returns platform and kind of every device."""
    return [f"{device.platform} {device.device_kind}" for device in jax.devices()]


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of this package, Python and the libraries that results come from."""
    return {
        "dlc_jax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }
