"""Libraries that are imported as soon as they are used: Arrow, and what fetches from the hub."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dlc_jax import expect


class _Lazily:
    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
else:  # images in folders need none of them
    pa, pc, pq = map(_Lazily, ("pyarrow", "pyarrow.compute", "pyarrow.parquet"))

__all__ = ["fetching", "pa", "pc", "pq"]


@contextlib.contextmanager
def fetching(what: str, otherwise: str) -> Iterator[ModuleType]:
    """Gives the library that fetches from the Hugging Face hub; ValueError where that fails.

    Args:
      what: Beginning of the message, up to "could not be" or the like.
      otherwise: What to do then, a sentence.
    """
    import huggingface_hub  # only when a hub id is used: the import costs half a second

    try:
        yield huggingface_hub
    except expect.InputError:
        raise
    except Exception as error:  # its errors for no network, no such id and no access vary
        said = expect.first_line(error)
        raise expect.InputError(
            f"{what} fetched from the Hugging Face hub ({said}). {otherwise}"
        ) from error
