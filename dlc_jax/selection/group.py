"""What a selector picks from, and the settings of the pick."""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int64, Integer, Shaped, UInt64

from dlc_jax.selection.lots import lots

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
