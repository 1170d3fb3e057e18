"""Lots that follow from the ids of samples: the same on every machine, in any order of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt64

_BLOCK = 1 << 12  # ids whose characters are 64 bits wide at a time


def id_keys(ids: Shaped[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Returns 64 bits for each id, which depend on its characters only.

    Args:
      ids: Text; the width of the array does not matter.
    """
    text = np.asarray(ids, np.str_)
    width = max(text.dtype.itemsize // 4, 1)
    factors = _mixed(np.arange(1, width + 1, dtype=np.uint64))
    keys = np.empty(len(text), np.uint64)
    for start in range(0, len(text), _BLOCK):
        block = np.ascontiguousarray(text[start : start + _BLOCK], f"=U{width}")
        characters = block.view(np.uint32).reshape(-1, width)
        keys[start : start + _BLOCK] = characters.astype(np.uint64) @ factors  # modulo 2^64
    return keys


def lots(keys: UInt64[np.ndarray, " n"], draw: Sequence[int]) -> UInt64[np.ndarray, " n"]:
    """Returns the lot of each sample in a draw; the lowest lots are drawn first.

    A sample's lot depends on its id and the draw only. Different keys get different lots.

    Args:
      keys: From `id_keys`.
      draw: Non-negative integers that name the draw.
    """
    return _mixed(keys ^ np.random.SeedSequence(list(draw)).generate_state(1, np.uint64))


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Maps 64 bits to 64 bits one to one, each output bit depending on all input bits.

    Source: Stafford's variant 13 of the finaliser of MurmurHash3, as in SplitMix64.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
