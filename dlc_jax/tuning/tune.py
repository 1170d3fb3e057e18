"""Which method, which split and how much to keep: asked of held-out parts of the training data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer, UInt64
from tqdm import tqdm

from dlc_jax import expect
from dlc_jax.distributed import Run, hides_bar
from dlc_jax.selection import DEFAULT_SPLIT, SELECTORS, Candidates, Rules, id_keys, lots
from dlc_jax.tuning.gaps import HeldOut, gap, likeness_of, mean_accuracy, of_many
from dlc_jax.tuning.linear import LinearProbeConfig
from dlc_jax.tuning.trials import TRIALS, LinearTrials, Trial, Trials
from dlc_jax.types import (
    KEEP_FRACTIONS,
    Choice,
    Gap,
    Tried,
    Tuning,
    features_fingerprint,
    scores_fingerprint,
    setting,
)

METHODS = ("random", "easiest", "hardest", "flexrand", "ccs", "herding", "d2")
NUM_PARTS = 5  # a fifth is held out at a time, as in the paper
_LEVEL = 0.05  # most likely to prefer something at a keep fraction where nothing is better
_LOW = 0.5  # keep fractions to here, and those above, are looked at together
_Way: TypeAlias = tuple[str, float | None]  # method and split
_RANDOM: _Way = ("random", None)
# features alone are measured before tuning; a training record has seen the held-out labels
CAN_BE_TRIED = [
    name
    for name, method in SELECTORS.items()
    if method.score is None and {*method.needs} <= {"scores", "features"}
]


class _Cell(NamedTuple):
    """A way of choosing at a keep fraction; the full set has keep fraction 1."""

    keep_fraction: float
    method: str
    split: float | None


_FULL = _Cell(1.0, "full", None)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How `auto` is decided, and how much can be dropped, on held-out training data."""

    by: str = setting("linear_probe", f"what is trained: {', '.join(TRIALS)}")
    methods: tuple[str, ...] = setting(METHODS, "methods that are compared")
    splits: tuple[float, ...] = setting(
        tuple(round(0.05 * i, 2) for i in range(1, 20)), "FlexRand's gammas that are compared"
    )
    num_repeats: int = setting(25, "held-out fifths; five of them are the whole training set")
    tolerance: float = setting(1.0, "points that may be lost against the full set")

    @property
    def needs_features(self) -> bool:
        """Whether linear heads are trained, or a method that is compared needs features."""
        return self.by == "linear_probe" or any(
            "features" in SELECTORS[method].needs for method in self.methods
        )

    def check(self) -> None:
        expect.one_of("tuning.by", self.by, TRIALS)
        check_tried(self.methods, self.splits, self.num_repeats, "tuning.")
        expect.at_least("tuning.tolerance", self.tolerance, 0)


def tune(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    features: np.ndarray | None = None,
    trials: LinearProbeConfig | Trials = LinearProbeConfig(),
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
    methods: Sequence[str] | None = None,
    splits: Sequence[float] = TuningConfig.splits,
    num_repeats: int = TuningConfig.num_repeats,
    min_per_class: int = Rules.min_per_class,
    seed: int = 0,
    run: Run = Run(),
) -> Tuning:
    """Compares ways of choosing on held-out fifths of the training data; test data have no part.

    In every repeat a fifth of each class is held out, what each method keeps of the rest is trained
    on, and the held-out samples are classified. Five repeats hold every sample out once. Method
    `auto` becomes the best one where it is better than random pruning beyond noise, and random
    otherwise; split `auto` FlexRand's best split where it is better than 0.5 beyond noise, and 0.5
    otherwise. Beyond noise: one-sided p at most 5 %, corrected for what is compared at that keep
    fraction (Dunnett; see `dlc_jax.tuning.gaps`), half of it for the mean over all to 0.5, or over
    all above, so that what is a little better at each of them is found, and half for the keep
    fraction itself, where nothing is better over all.

    Args:
      scores: [n] hardness, higher is harder. They may come from all samples, since methods are
        compared on equal terms.
      labels: [n] class ids.
      ids: [n] sample ids, which then decide what is held out and drawn; as in `select`.
      features: [n, d] features of the frozen encoder, as from `features`; linear heads are
        trained on them.
      trials: How linear heads are trained, from a start as after pooling; or what trains and tests
        instead of them, such as `FinetuneTrials`.
      keep_fractions: What to tune for.
      methods: What to compare; random always is. Those that need features take these. None:
        `METHODS`, but for those that need features where there are none.
      splits: FlexRand's gammas to compare; 0.5 always is.
      num_repeats: Held-out parts; multiples of five hold every sample out equally often.
      min_per_class: See `Rules`.
      seed: Seed of parts and draws.
      run: Devices of this process that linear heads are divided among, and whether to show a bar;
        see `Run`. Its folder must be None; `FinetuneTrials` can be given one.
    Returns:
      Accuracies and gaps of everything that was tried, and a choice per keep fraction.
    Raises:
      ValueError: as `select` and `linear_probes`; no features for linear heads; a keep fraction at
        which nothing would be kept; too few samples to hold any out.
    Source: Jiang et al. 2025, section 4, for tuning gamma on a fifth of the training data.
    Example:
      >>> labels = np.repeat([0, 1], 50)
      >>> features = np.eye(2, dtype=np.float32)[labels]
      >>> scores = np.linspace(0, 1, 100, dtype=np.float32)
      >>> tuning = dlc.tune(
      ...     scores, labels, features=features, methods=("easiest",), keep_fractions=(0.2, 0.5)
      ... )
      >>> tuning.full_accuracy, tuning.choice(0.5).label  # all are right, so none is better
      (100.0, 'random')
    """
    start = time.perf_counter()
    scores, labels = np.asarray(scores), np.asarray(labels)
    expect.scores_fit_labels(scores, labels)
    if methods is None:
        methods = [
            m for m in METHODS if features is not None or "features" not in SELECTORS[m].needs
        ]
    check_tried(methods, splits, num_repeats)
    for keep_fraction in keep_fractions:
        expect.keep_fraction(keep_fraction, "keep_fractions")
    if not keep_fractions:
        raise expect.InputError("keep_fractions: expected one or more, got none.")
    expect.seed(seed)
    expect.seed(seed + num_repeats - 1, "seed of the last repeat")
    if len(labels) < NUM_PARTS:
        raise expect.InputError(
            f"tune: {len(labels)} samples are too few to hold a fifth out; expected five or more."
        )
    expect.is_a(Run, run=run)
    if run.folder is not None:
        raise expect.InputError(
            f"run.folder: expected None, as tune keeps nothing there, got {str(run.folder)!r}; "
            "FinetuneTrials can be given one."
        )
    if isinstance(trials, LinearProbeConfig):
        if features is None:
            raise expect.InputError(
                "tune: linear heads need features=dlc.features(...); trials=... trains otherwise."
            )
        expect.features_fit_labels("features", features, labels)
        trials = LinearTrials(features, labels, trials, run.mesh)
    elif not isinstance(trials, Trials):
        raise expect.InputError(
            "trials: expected dlc.LinearProbeConfig(...), or what trains otherwise, such as "
            f"dlc.FinetuneTrials(...), got {expect.shortened(repr(trials))}."
        )
    cells = _cells(keep_fractions, methods, splits)
    ids = None if ids is None else np.asarray(ids, np.str_)
    keys = None if ids is None else id_keys(ids)
    num_partitions = -(-num_repeats // NUM_PARTS)
    held_out_in = HeldOut(np.full((num_partitions, len(labels)), -1), num_repeats)
    right = np.zeros((len(cells), num_partitions, len(labels)), bool)
    for repeat in tqdm(range(num_repeats), "tune", unit="split", disable=hides_bar(run.progress)):
        is_held_out = parts(labels, keys, seed, repeat // NUM_PARTS) == repeat % NUM_PARTS
        held_out, fit = np.flatnonzero(is_held_out), np.flatnonzero(~is_held_out)
        candidates = Candidates(
            scores[fit],
            labels[fit],
            ids=None if ids is None else ids[fit],
            features=None if features is None else features[fit],
        )
        draw = seed + repeat
        chosen = [_chosen(candidates, cell, draw, min_per_class) for cell in cells]
        correct = trials([Trial(fit[some], draw) for some in chosen], held_out)
        held_out_in.repeat[repeat // NUM_PARTS, held_out] = repeat
        right[:, repeat // NUM_PARTS, held_out] = correct
    outcomes = dict(zip(cells, right, strict=True))
    tried = [_tried(cell, outcomes, held_out_in) for cell in cells if cell != _FULL]
    with_split = [row for row in tried if row.split is not None]
    corrected = functools.partial(_p_values, outcomes, held_out_in)
    return Tuning(
        tried=tuple(tried),
        methods=_choices(tried, _RANDOM, "to_random", "random pruning", corrected),
        splits=_choices(with_split, ("flexrand", DEFAULT_SPLIT), "to_even", "split 0.5", corrected),
        full_accuracy=mean_accuracy(outcomes[_FULL], held_out_in),
        trained=trials.name,
        num_repeats=num_repeats,
        min_per_class=min_per_class,
        scores_fingerprint=scores_fingerprint(scores, labels),
        features_fingerprint=None if features is None else features_fingerprint(features),
        seconds=time.perf_counter() - start,
    )


def check_tried(
    methods: Sequence[str], splits: Sequence[float], num_repeats: int, where: str = ""
) -> None:
    """Raises ValueError unless there are such methods, splits and numbers of repeats."""
    for split in splits:
        expect.split(split, f"{where}splits")
    for method in methods:
        expect.one_of(f"{where}methods", method, CAN_BE_TRIED)
    expect.integer(f"{where}num_repeats", num_repeats, 2)


def _cells(
    keep_fractions: Sequence[float], methods: Sequence[str], splits: Sequence[float]
) -> list[_Cell]:
    """Returns everything that is tried."""
    ways: list[_Way] = [_RANDOM]
    for method in methods:
        if SELECTORS[method].has_split:
            ways += [(method, float(split)) for split in sorted({*splits, DEFAULT_SPLIT})]
        elif (method, None) not in ways:
            ways.append((method, None))
    keeps = sorted(set(keep_fractions))
    return [_FULL, *(_Cell(float(keep), *way) for keep in keeps for way in ways)]


def _chosen(
    candidates: Candidates, cell: _Cell, draw: int, min_per_class: int
) -> Int64[np.ndarray, " _"] | slice:
    if cell == _FULL:
        return slice(None)
    rules = Rules(min_per_class=min_per_class)
    chosen = candidates.select(**cell._asdict(), seed=draw, rules=rules)
    if len(chosen) == 0:
        raise expect.InputError(
            f"keep_fractions: {cell.keep_fraction:g} keeps no sample of four fifths of the data "
            "(budgets are rounded in every class); expected larger ones, or min_per_class=1."
        )
    return chosen.indices


def parts(
    labels: Integer[np.ndarray, " n"],
    keys: UInt64[np.ndarray, " n"] | None,
    seed: int,
    partition: int,
) -> Int64[np.ndarray, " n"]:
    """Deals the samples of every class out to the parts, by lot."""
    part = np.empty(len(labels), np.int64)
    dealt = 0  # runs on from class to class, so that small classes do not all go to the same part
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        draw = [seed, partition, int(label), zlib.crc32(b"held out")]
        if keys is None:
            shuffled = np.random.default_rng(draw).permutation(members)
        else:
            shuffled = members[np.argsort(lots(keys[members], draw))]
        part[shuffled] = (dealt + np.arange(len(members))) % NUM_PARTS
        dealt += len(members)
    return part


def _tried(cell: _Cell, outcomes: dict[_Cell, np.ndarray], held_out: HeldOut) -> Tried:
    """Returns the row of a cell, with its gaps."""

    def gap_to(other: _Cell) -> Gap:
        return gap(_difference(outcomes[cell], outcomes[other]), held_out)

    return Tried(
        *cell,
        accuracy=mean_accuracy(outcomes[cell], held_out),
        to_random=gap_to(_Cell(cell.keep_fraction, *_RANDOM)),
        to_full=gap_to(_FULL),
        to_even=None if cell.split is None else gap_to(cell._replace(split=DEFAULT_SPLIT)),
    )


def _difference(
    one: Bool[np.ndarray, "p n"], other: Bool[np.ndarray, "p n"]
) -> Float32[np.ndarray, "p n"]:
    return 100 * (one.astype(np.float32) - other)


def _p_values(
    outcomes: dict[_Cell, np.ndarray],
    held_out: HeldOut,
    reference: _Way,
    keep_fractions: Sequence[float],
    ways: Sequence[_Way],
) -> list[float]:
    """Returns how likely each way is so good on average where none is better than the reference.

    Args:
      outcomes, held_out: What everything came to, and when samples were held out.
      reference: What the others are compared with.
      keep_fractions: Over which differences are averaged.
      ways: What is compared; p-values are corrected for them all.
    """
    means = np.stack(
        [
            np.mean(
                [
                    _difference(outcomes[_Cell(keep, *way)], outcomes[_Cell(keep, *reference)])
                    for keep in keep_fractions
                ],
                axis=0,
            )
            for way in ways
        ]
    )
    alone = [gap(difference, held_out).p_value for difference in means]
    return of_many(alone, likeness_of(means[:, held_out.repeat >= 0]))


_Corrected: TypeAlias = Callable[[_Way, Sequence[float], Sequence[_Way]], list[float]]


def _choices(
    tried: list[Tried], reference: _Way, gap_to: str, name: str, corrected: _Corrected
) -> tuple[Choice, ...]:
    """Returns for each keep fraction what is better than the reference beyond noise, or that.

    Better beyond noise over the keep fractions to 0.5, or those above, together, and on average at
    this one; or, if nothing is, at the keep fraction itself: each at half the level, so that both
    are wrong in as few data sets.

    Args:
      tried: Everything that is compared, by keep fraction.
      reference: Method and split.
      gap_to: Entry that has the gaps to it.
      name: What messages call it.
      corrected: Returns p-values; see `_p_values`.
    """
    groups = [list(rows) for _, rows in itertools.groupby(tried, lambda row: row.keep_fraction)]
    found = {}
    for is_low in (True, False):
        pool = [rows for rows in groups if (rows[0].keep_fraction <= _LOW) == is_low]
        if not pool:
            continue
        keeps = [rows[0].keep_fraction for rows in pool]
        ways = [(row.method, row.split) for row in pool[0]]
        ways = [way for way in ways if way != reference]
        level = _LEVEL if len(pool) == 1 else _LEVEL / 2

        def sure(
            keep_fractions: Sequence[float], ways: list[_Way] = ways, level: float = level
        ) -> set[_Way]:
            p_values = corrected(reference, keep_fractions, ways) if ways else []
            return {way for way, p in zip(ways, p_values, strict=True) if p <= level}

        together = sure(keeps)
        for rows in pool:
            keep = rows[0].keep_fraction
            found[keep] = _choice(rows, reference, gap_to, name, (together, sure([keep])))
    return tuple(found[rows[0].keep_fraction] for rows in groups)


def _choice(
    rows: list[Tried], reference: _Way, gap_to: str, name: str, sure: Sequence[set[_Way]]
) -> Choice:
    """Returns the best of the first set that has one better on average, or else the reference."""
    keep_fraction = rows[0].keep_fraction
    others = [(row, getattr(row, gap_to)) for row in rows if (row.method, row.split) != reference]
    if not others:
        return Choice(keep_fraction, *reference, f"{name}: nothing else was tried")
    among = f"of {len(others)} compared with {name} on held-out training data"
    ahead = [other for other in others if other[1].mean > 0]
    in_each = [[(row, its) for row, its in ahead if (row.method, row.split) in s] for s in sure]
    better = next(filter(None, in_each), [])
    best, its_gap = max(better or others, key=lambda other: other[1].mean)
    if better:
        why = f"{best.label}: {its_gap} points, beyond noise, and the best {among}"
        return Choice(keep_fraction, best.method, best.split, why)
    why = f"{name}: nothing is better beyond noise; {best.label}, the best {among}, is at {its_gap}"
    return Choice(keep_fraction, *reference, why)


class KeepCurve(NamedTuple):
    """Validation accuracy against the keep fraction.

    Attributes:
      rows: One per keep fraction, ascending; `accuracy` in percent, `to_full` with its interval.
      full_accuracy: Accuracy of training on everything.
      tolerance: Points that may be lost.
      smallest: The smallest keep fraction from which on no more than that is lost on average; 1
        where the largest one loses more.
      surely: The same with the lower end of the 95 % interval in place of the average.
    """

    rows: tuple[Tried, ...]
    full_accuracy: float
    tolerance: float
    smallest: float
    surely: float


def keep_curve(
    tuning: Tuning, *, method: str = "auto", tolerance: float = TuningConfig.tolerance
) -> KeepCurve:
    """Returns what a method loses by keeping less, and the smallest keep fraction that will do.

    Args:
      tuning: From `tune`.
      method: `auto` for the choice at each keep fraction, `flexrand` for its chosen split, or
        another method that was tried.
      tolerance: Percentage points that may be lost against training on everything.
    Raises:
      ValueError: a method that was not tried, or a tolerance below 0.
    Example:
      >>> labels = np.repeat([0, 1], 50)
      >>> features = np.eye(2, dtype=np.float32)[labels]
      >>> scores = np.linspace(0, 1, 100, dtype=np.float32)
      >>> tuning = dlc.tune(
      ...     scores, labels, features=features, methods=("easiest",), keep_fractions=(0.2, 0.5)
      ... )
      >>> dlc.keep_curve(tuning).smallest
      0.2
    """
    expect.at_least("tolerance", tolerance, 0)
    if method in ("auto", "flexrand"):
        choices = tuning.methods if method == "auto" else tuning.splits
        rows = tuple(tuning.row(*choice[:3]) for choice in choices)
    else:
        rows = tuple(row for row in tuning.tried if row.method == method)
    if not rows:
        names = dict.fromkeys(row.method for row in tuning.tried)
        raise expect.InputError(
            f"method: {method!r} was not tried; tried: auto, {', '.join(names)}."
        )
    means = [row.to_full.mean for row in rows]
    lowest = [row.to_full.mean - row.to_full.half_width for row in rows]
    smallest, surely = (_smallest(rows, gaps, tolerance) for gaps in (means, lowest))
    return KeepCurve(rows, tuning.full_accuracy, tolerance, smallest, surely)


def _smallest(rows: tuple[Tried, ...], gaps: list[float], tolerance: float) -> float:
    """From it on all larger ones are within the tolerance, so that a lucky one does not count."""
    smallest = 1.0
    for row, its_gap in reversed(list(zip(rows, gaps, strict=True))):
        if its_gap < -tolerance:
            break
        smallest = row.keep_fraction
    return smallest
