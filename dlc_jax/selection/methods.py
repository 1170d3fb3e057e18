"""What a selector picks from, selectors by rank or chance alone, and how much a class keeps."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, Shaped, UInt64

from dlc_jax import expect
from dlc_jax.types import Conventions

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
class Known:
    """What is known of all n samples of a data set; its arrays are never copied.

    Attributes:
      labels: [n] class ids.
      scores: [n] hardness, higher is harder; None if none was given.
      inputs: Those of `INPUTS` that were given, [n, d], by name.
      keys: [n] keys of the ids, from `id_keys`; None where positions decide lots.
    """

    labels: Integer[np.ndarray, " n"]
    scores: Shaped[np.ndarray, " n"] | None = None
    inputs: Mapping[str, Float[np.ndarray, "n _"]] = dataclasses.field(default_factory=dict)
    keys: UInt64[np.ndarray, " n"] | None = None
    _means: dict[str, Float64[np.ndarray, "c d"]] = dataclasses.field(
        default_factory=dict, init=False
    )

    def class_means(self, name: str) -> Float64[np.ndarray, "c d"]:
        """Returns the mean of an input over each class that there is, in the order of labels."""
        if name not in self._means:
            order = np.argsort(self.labels, kind="stable")
            starts = np.unique(self.labels[order], return_index=True)[1]
            rows = self.inputs[name]
            means = [
                rows[some].mean(axis=0, dtype=np.float64) for some in np.split(order, starts[1:])
            ]
            self._means[name] = np.stack(means)
        return self._means[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The samples of one class, or of all of them; made once, however often it is picked from.

    Attributes:
      positions: Where they are: easiest first for methods that need scores. Ties, and all samples
        where scores are not needed, are in the order of their keys, or of positions without keys.
      known: What is known of the whole data set.
      inputs: Names of the inputs that the method uses.
    """

    positions: Positions
    known: Known
    inputs: tuple[str, ...] = ()
    _ranks: dict[tuple[int, int, str], np.ndarray] = dataclasses.field(
        default_factory=dict, init=False
    )

    @property
    def rows(self) -> Float[np.ndarray, "n _"]:
        """Rows of the whole data set, of the first input that the method uses."""
        return self.known.inputs[self.inputs[0]]

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
            if self.known.keys is not None:
                ranks = np.argsort(lots(self.known.keys[self.positions], seeds))
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


def easiest(group: Group, draw: Draw) -> Positions:
    """Returns the samples of lowest score."""
    return group.positions[: budget(group, draw)]


def hardest(group: Group, draw: Draw) -> Positions:
    """Returns the samples of highest score."""
    return group.positions[len(group.positions) - budget(group, draw) :]


def middle(group: Group, draw: Draw) -> Positions:
    """Returns the samples of middle score: as many are left out at either end, one more hard.

    Source: Jiang et al. 2025, under-sampling in the ablations.
    """
    num = budget(group, draw)
    start = (len(group.positions) - num) // 2
    return group.positions[start : start + num]


def most_uncertain(group: Group, draw: Draw) -> Positions:
    """Returns the samples of highest score, the score being a classifier's uncertainty.

    Variant `deepcore`: DeepCore's unbalanced path sorts the wrong way round, so the samples of
    lowest score where the group is not a class. Variant `paper`: those of lowest score anyway.

    Source: Coleman et al. 2020, Selection via Proxy; DeepCore, methods/uncertainty.py; Jiang et al.
      2025, baselines.
    """
    if draw.variant == "paper" or (draw.variant == "deepcore" and not draw.per_class):
        return easiest(group, draw)
    return hardest(group, draw)


def random(group: Group, draw: Draw) -> Positions:
    """Returns samples drawn without replacement."""
    return group.positions[group.ranks_by_lot(draw, "random")[: budget(group, draw)]]


def rds(group: Group, draw: Draw) -> Positions:
    """Returns the samples most similar to target samples, which take turns.

    A target's first turn takes the sample most similar to it, its second the next, and so on; a
    turn that finds its sample taken is lost. Rows are similarities to each target.

    Source: Ivison et al. 2025, Large-scale data selection for instruction tuning (RDS+).
    """
    num_targets = group.rows.shape[1]
    turn = np.full(len(group.positions), np.iinfo(np.int64).max)
    for target in range(num_targets):
        order = np.argsort(-group.rows[group.positions, target], kind="stable")
        turn[order] = np.minimum(turn[order], np.arange(len(order)) * num_targets + target)
    return group.positions[np.argsort(turn)[: budget(group, draw)]]


_SHARE_DROPPED = 0.1  # beta, of the hardest
_NUM_STRATA = 50


def ccs(group: Group, draw: Draw) -> Positions:
    """Drops the hardest tenth of the group and draws evenly over the score range of the rest.

    floor(n / 10) samples are dropped, or fewer where the budget leaves fewer to drop. The range of
    the rest is cut into 50 strata of equal width; where all scores are equal, into one.

    Source: Zheng et al. 2023, Coverage-centric coreset selection for high pruning rates, alg. 1.
    """
    rest, strata, budgets = strata_of(group, draw)
    ranks = group.ranks_by_lot(draw, "ccs")
    ranks = ranks[ranks < len(rest)]
    by_lot = strata[ranks]
    called = [np.flatnonzero(by_lot == k)[:num] for k, num in enumerate(budgets)]
    return rest[ranks[np.concatenate(called)]]


def strata_of(group: Group, draw: Draw) -> tuple[Positions, Int64[np.ndarray, " _"], list[int]]:
    """Returns all but the hardest samples, the stratum of each, and how many each stratum keeps."""
    scores = group.known.scores
    assert scores is not None
    num_samples, num_kept = len(group.positions), budget(group, draw)
    num_dropped = min(int(num_samples * _SHARE_DROPPED), num_samples - num_kept)
    rest = group.positions[: num_samples - num_dropped]
    strata = _strata(scores[rest])
    sizes = np.bincount(strata, minlength=_NUM_STRATA)
    return rest, strata, even_budgets(sizes, num_kept)


def _strata(scores: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns the stratum of each score, 0 for the easiest; the highest score is in the last."""
    scores = scores.astype(np.float64)
    inner = np.linspace(scores.min(), scores.max(), _NUM_STRATA + 1)[1:-1]
    if inner[0] == inner[-1]:
        return np.zeros(len(scores), np.int64)
    return np.searchsorted(inner, scores, side="right")


def even_budgets(sizes: Int64[np.ndarray, " s"], total: int) -> list[int]:
    """Splits `total` evenly, smallest stratum first; what one cannot give, the later ones do.

    The budgets add up to `total` exactly wherever the sizes do to as much.
    """
    budgets = [0] * len(sizes)
    for done, k in enumerate(np.argsort(sizes, kind="stable").tolist()):
        budgets[k] = min(int(sizes[k]), total // (len(sizes) - done))
        total -= budgets[k]
    return budgets


def fractions(keep_fraction: float, split: float) -> tuple[float, float]:
    """Returns the easy and the hard share of a class, which add up to `keep_fraction`."""
    if split <= 0.5:
        easy = min(split, keep_fraction / 2)
        return easy, keep_fraction - easy
    hard = min(1 - split, keep_fraction / 2)
    return keep_fraction - hard, hard


def budgets(num_samples: int, keep_fraction: float, split: float) -> tuple[int, int, int]:
    """Returns the easy pool's size, and how many to draw from the easy and from the hard pool.

    The draws add up to round(num_samples keep_fraction), half to even, and fit their pools.
    """
    total = round(num_samples * keep_fraction)
    pool = round(num_samples * split)
    easy_share, _ = fractions(keep_fraction, split)
    hard = min(max(total - round(num_samples * easy_share), 0), num_samples - pool)
    return pool, total - hard, hard


def flexrand(group: Group, draw: Draw) -> Positions:
    """Draws from the easy and the hard pool of a group, without replacement.

    Source: Jiang et al. 2025, section 4.
    """
    assert draw.split is not None
    num_samples = len(group.positions)
    pool, num_easy, num_hard = budgets(num_samples, draw.keep_fraction, draw.split)
    ranks = group.ranks_by_lot(draw, "flexrand")
    is_easy = ranks < pool
    easy, hard = np.flatnonzero(is_easy)[:num_easy], np.flatnonzero(~is_easy)[:num_hard]
    return group.positions[ranks[np.concatenate([easy, hard])]]


def released_value(name: str, value: float, known: tuple[float, ...]) -> float:
    """Returns the split or keep fraction as the released code has it, rounding and all.

    Args:
      name: For the message.
      value: As it was asked for.
      known: All that there are.
    Raises:
      ValueError: the released code has no such value.
    """
    for found in known:
        if abs(value - found) < 1e-9:
            return found
    digits = 1 if known[0] == round(known[0], 1) else 2
    shown = [f"{found:.{digits}f}" for found in known]
    valid = ", ".join(shown if len(shown) < 4 else [*shown[:2], "...", shown[-1]])
    raise expect.InputError(f"{name}: mode 'official' has {valid} only, got {value!r}.")


def flexrand_as_released(
    ranked: list[Positions],
    keep_fraction: float,
    split: float,
    seed: int,
    conventions: Conventions,
) -> list[Positions]:
    """Returns the kept positions of every class, each of which is ranked easiest first.

    The generator's state at a cell depends on the class sizes alone, so that a cell asked for by
    itself is the one at its place in the stream.

    Raises:
      ValueError: the released code has no such cell.
    """
    grid = conventions.splits, conventions.keep_fractions
    cell = (
        released_value("split", split, grid[0]),
        released_value("keep_fraction", keep_fraction, grid[1]),
    )
    generator = np.random.RandomState()
    generator.set_state(_states(tuple(len(positions) for positions in ranked), seed, *grid)[cell])
    kept = []
    for positions in ranked:
        pool, num_easy, num_hard = released_draws(len(positions), *cell)
        easy = generator.choice(positions[:pool], num_easy, replace=False)
        hard = generator.choice(positions[pool:], num_hard, replace=False)
        kept.append(np.concatenate([easy, hard]))
    return kept


def released_draws(num_samples: int, split: float, keep_fraction: float) -> tuple[int, int, int]:
    """Returns the easy pool's size, and how many are drawn from the easy and from the hard pool."""
    easy, hard = fractions(keep_fraction, split)
    return round(num_samples * split), round(num_samples * easy), round(num_samples * hard)


@functools.lru_cache(maxsize=8)
def _states(
    sizes: tuple[int, ...],
    seed: int,
    splits: tuple[float, ...],
    keep_fractions: tuple[float, ...],
) -> dict[tuple[float, float], Any]:
    """Returns the generator's state before each cell."""
    generator = np.random.RandomState(seed)
    states = {}
    for split in splits:
        for keep_fraction in keep_fractions:
            states[split, keep_fraction] = generator.get_state()
            for size in sizes:
                pool, num_easy, num_hard = released_draws(size, split, keep_fraction)
                generator.choice(pool, num_easy, replace=False)
                generator.choice(size - pool, num_hard, replace=False)
    return states


def proportional(
    members: list[Positions],
    scores: Shaped[np.ndarray, " n"] | None,
    keep_fraction: float,
    min_per_class: int,
) -> list[float]:
    """Returns the fraction to keep of each class: the same, but for the bounds.

    Args:
      members: Positions of each class's samples.
      scores: Not looked at.
      keep_fraction: Fraction kept of every class.
      min_per_class: Least samples of a class, all of one that has no more. A class of one sample
        keeps it.
    """
    return [_fraction(len(positions), keep_fraction, min_per_class) for positions in members]


def _fraction(num_samples: int, keep_fraction: float, min_per_class: int) -> float:
    if num_samples == 1:  # rounding would lose the class
        return 1.0
    least = min(min_per_class, num_samples)
    return keep_fraction if round(num_samples * keep_fraction) >= least else least / num_samples


def nucs(
    members: list[Positions],
    scores: Shaped[np.ndarray, " n"] | None,
    keep_fraction: float,
    min_per_class: int,
) -> list[float]:
    """Returns the fraction to keep of each class, more of a class that is harder.

    As many samples in all as `proportional` keeps. A class's share is proportional to its size
    times its mean score, scores below its 5th and above its 95th percentile counting as these.
    Largest remainders are rounded up. No class keeps more than it has or fewer than `min_per_class`
    (or its only sample); what that leaves over or takes is shared among the others by the same
    rule. Where every score is 0, shares are proportional to size.

    Args:
      members, keep_fraction, min_per_class: As in `proportional`.
      scores: [n] zero or more.
    Raises:
      ValueError: a score is negative, so that it gives no share.
    Source: Zhang et al. 2025, Non-uniform class-wise coreset selection.
    """
    assert scores is not None
    if scores.min() < 0:
        raise expect.InputError(
            "scores: allocation 'nucs' shares out by mean score, expected none below 0, got "
            f"{scores.min()} at position {scores.argmin()}."
        )
    sizes = np.array([len(positions) for positions in members])
    least = np.where(sizes == 1, 1, np.minimum(min_per_class, sizes))
    fractions = proportional(members, scores, keep_fraction, min_per_class)
    total = sum(round(n * share) for n, share in zip(sizes.tolist(), fractions, strict=True))
    weights = sizes * np.array([_winsorised_mean(scores[positions]) for positions in members])
    return (shares(total, weights, least, sizes) / sizes).tolist()


def _winsorised_mean(scores: Shaped[np.ndarray, " _"]) -> float:
    scores = scores.astype(np.float64)
    return float(np.clip(scores, *np.percentile(scores, [5, 95])).mean())


def shares(
    total: int,
    weights: Float64[np.ndarray, " c"],
    least: Int64[np.ndarray, " c"],
    most: Int64[np.ndarray, " c"],
) -> Int64[np.ndarray, " c"]:
    """Splits `total` in proportion to weights, within bounds, by largest remainder.

    Bounds that the shares break become shares, on the side that is broken by more in all, and the
    rest is split anew, as often as needed. Equal remainders go to the first.

    Args:
      total: At least the sum of `least`, at most that of `most`.
      weights: Zero or more; where the rest has none, it is split in proportion to `most`.
    """
    exact, free = np.zeros(len(weights)), np.ones(len(weights), bool)
    while free.any():
        own = weights if weights[free].sum() > 0 else most
        exact[free] = (total - exact[~free].sum()) * (own[free] / own[free].sum())
        bounded = np.clip(exact, least, most)
        too_low = (bounded - exact).sum() >= 0
        broken = free & (bounded > exact if too_low else bounded < exact)
        if not broken.any():
            break
        exact[broken] = bounded[broken]
        free &= ~broken
    floors = np.floor(exact).astype(np.int64)
    remainders = np.where(free, exact - floors, -1.0)
    floors[np.argsort(-remainders, kind="stable")[: total - floors.sum()]] += 1
    return floors


ALLOCATIONS: Mapping[str, Callable[..., list[float]]] = {"proportional": proportional, "nucs": nucs}
