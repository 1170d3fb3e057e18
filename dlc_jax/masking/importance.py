"""Which weights may be zeroed, and which of them matter least."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np

from dlc_jax import checks
from dlc_jax.types import Params, by_path

# Importance per prunable leaf, by path; None where it is the weight's own magnitude, which is
# then computed on the fly and costs no memory.
Importance: TypeAlias = dict[str, np.ndarray | jax.Array] | None

MASKINGS = ("l1", "random")


def prunable_paths(params: Params, is_prunable: Callable[[str], bool]) -> tuple[str, ...]:
    """Returns the paths of the prunable leaves, in tree order.

    Raises:
      ValueError: no leaf is prunable, or one is not floating point.
    """
    leaves = by_path(params)
    paths = tuple(path for path in leaves if is_prunable(path))
    if not paths:
        shown = checks.listed(leaves)
        raise checks.InputError(
            f"encoder: is_prunable accepts none of its {len(leaves)} parameters ({shown})."
        )
    for path in paths:
        if not jax.numpy.issubdtype(leaves[path].dtype, np.floating):
            raise checks.InputError(
                f"encoder: prunable parameter {path} is {leaves[path].dtype}, expected floats."
            )
    return paths


def weight_importance(
    params: Params, prunable: tuple[str, ...], masking: str, seed: int
) -> Importance:
    """Returns how much each prunable weight matters; probes zero the least important first.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves.
      masking: `l1`, the weight's magnitude, or `random`, one uniform draw in [0, 1) for the whole
        path.
      seed: Seed of the random draw.
    """
    if masking == "l1":
        return None
    generator = np.random.default_rng([seed, *b"importance"])
    leaves = by_path(params)
    return {path: generator.random(leaves[path].shape, np.float32) for path in prunable}
