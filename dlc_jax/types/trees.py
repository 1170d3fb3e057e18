"""Paths of the leaves of a tree."""

from __future__ import annotations

from typing import Any

import jax

Params = Any  # a pytree of arrays


def path_name(path: tuple) -> str:
    """Returns `layer1/0/conv1/kernel` for the key path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(params: Params) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
