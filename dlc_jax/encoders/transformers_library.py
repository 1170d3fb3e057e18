"""The library transformers, imported when it is needed: it takes seconds."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from types import ModuleType


@functools.cache
def transformers_library() -> ModuleType:
    """Returns transformers, also where torchvision is installed but cannot be imported.

    Configurations and tokenizers need no torchvision, but transformers imports it where it is
    found; one that was built for another torch would stop it.
    """
    os.environ["RUST_BACKTRACE"] = "0"  # a tokenizer that panics is refused in a line
    try:
        importlib.import_module("torchvision")
    except Exception:  # it is not there, or fails in one of many ways
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # not to be found
    try:
        import transformers

        transformers.utils.is_torchvision_available()  # remembers what it finds
        return transformers
    finally:
        if sys.modules["torchvision"] is None:
            del sys.modules["torchvision"]
