"""What is fetched from the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

from dlc_jax import expect


@contextlib.contextmanager
def fetching(what: str, otherwise: str) -> Iterator[ModuleType]:
    """Gives the library that fetches; ValueError where that fails.

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
