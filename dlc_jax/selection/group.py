"""What a selector picks from, the settings of the pick, and lots that follow from sample ids."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int64, Integer, Shaped, UInt64

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


Positions: TypeAlias = Int64[np.ndarray, " _"]  # into the data set


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The samples of one class, or of all of them; made once, however often it is picked from.

    Attributes:
      positions: Where they are: easiest first for methods that need scores. Ties, and all samples
        where scores are not needed, are in the order of their keys, or of positions without keys.
      scores: [n] hardness of the whole data set, higher is harder; None if none was given.
      rows: [n, d] rows of the whole data set, never copied: the one of `INPUTS` that the method
        needs; None if it needs none.
      keys: [n] keys of the ids of the whole data set, from `id_keys`; None where positions decide
        lots.
    """

    positions: Positions
    scores: Shaped[np.ndarray, " n"] | None = None
    rows: Float[np.ndarray, "n d"] | None = None
    keys: UInt64[np.ndarray, " n"] | None = None
    _ranks: dict[tuple[int, int, str], np.ndarray] = dataclasses.field(
        default_factory=dict, init=False
    )

    def ranks_by_lot(self, draw: Draw, purpose: str) -> Integer[np.ndarray, " _"]:
        """Returns places in `positions`, in the order in which lots call them.

        (seed, label, purpose) and the id of a sample decide its lot; without ids, its place among
        those of the group in the data set does. Its rank does not: where two scores differ a
        little, what is drawn from one sample's pool differs only where that sample does.
        """
        key = (draw.seed, draw.label, purpose)
        if key not in self._ranks:
            seeds = [draw.seed, draw.label, zlib.crc32(purpose.encode())]
            num = len(self.positions)
            if self.keys is not None:
                ranks = np.argsort(lots(self.keys[self.positions], seeds))
            else:
                generator = np.random.default_rng(seeds)
                ranks = np.argsort(self.positions)[generator.permutation(num)]
            self._ranks[key] = ranks.astype(np.min_scalar_type(num))
        return self._ranks[key]


class Draw(NamedTuple):
    """How much of a group to keep, and how.

    Attributes:
      keep_fraction: The group's own, in [0, 1): round(size keep_fraction) are kept, half to even.
      split: FlexRand's gamma; None for methods that have none.
      seed, label: The only source of randomness; the label is 0 where the group is all samples.
      per_class: Whether the group is a class.
      variant: One of the method's variants.
    """

    keep_fraction: float
    split: float | None
    seed: int
    label: int
    per_class: bool
    variant: str


def budget(group: Group, draw: Draw) -> int:
    """Returns how many samples of the group to keep."""
    return round(len(group.positions) * draw.keep_fraction)
