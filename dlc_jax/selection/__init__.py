"""Scores -> kept subset, per class, within exact budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dlc_jax import checks
from dlc_jax.selection import flexrand, official, topk
from dlc_jax.selection.flexrand import Ranked
from dlc_jax.selection.kept import kept_positions
from dlc_jax.types import Selection, labels_fingerprint

__all__ = ["SELECTORS", "check_cell", "check_min_per_class", "kept_positions", "select"]

DEFAULT_SPLIT = 0.5


@runtime_checkable
class Selector(Protocol):
    """Picks from one class."""

    def __call__(
        self, ranked: Ranked, keep_fraction: float, split: float | None, seed: int, label: int, /
    ) -> Ranked:
        """Returns the kept positions of a class.

        Args:
          ranked: Positions of the class's samples, easiest first.
          keep_fraction: Fraction to keep.
          split: FlexRand's gamma; None for methods that have none.
          seed, label: The only source of randomness.
        """
        ...


class Method(NamedTuple):
    """A selector, and whether it takes a split."""

    select: Selector
    has_split: bool = False


SELECTORS: Mapping[str, Method] = {
    "flexrand": Method(flexrand.flexrand, has_split=True),
    "easiest": Method(topk.easiest),
    "hardest": Method(topk.hardest),
    "random": Method(topk.random),
}


def select(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    method: str = "flexrand",
    keep_fraction: float,
    split: float | None = None,
    seed: int = 0,
    min_per_class: int = 0,
    mode: str = "default",
    ids: np.ndarray | None = None,
) -> Selection:
    """Picks the samples to keep; every cell stands alone, whatever else is selected.

    Args:
      scores: [n] hardness, higher is harder; from `score` or your own.
      labels: [n] non-negative class ids.
      method: `flexrand`, `easiest`, `hardest` or `random`.
      keep_fraction: Fraction kept of each class, in (0, 1).
      split: FlexRand's gamma in (0, 1), the share of a class that counts as easy; default 0.5.
      seed: Seed of the draw; the draw of a class depends on (seed, class) alone.
      min_per_class: Least samples kept of a class, all of a class that has no more; a class that
        this raises is selected from as at the keep fraction that gives as many. Not in `official`.
      mode: `default`: exactly round(n_j keep_fraction) of a class of n_j samples, and its only
        sample where n_j is 1. `official`: the released code's draws, rounding and order of ties,
        for splits 0.05 i and keep fractions i / 10.
      ids: [n] sample ids; the selection then knows its samples by name, and `finetune` finds them
        in any order or part of the data set.
    Returns:
      Kept positions, ascending, with what made them.
    Raises:
      ValueError: unknown names, values out of range or off the official grid, scores that are not
        finite, lengths that differ.
    Source: Jiang et al. 2025, section 4.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    split = check_cell(method, keep_fraction, split, seed, mode)
    check_min_per_class(min_per_class, mode)
    checks.scores_fit_labels(scores, labels)
    if ids is not None and len(ids) != len(labels):
        raise checks.InputError(f"ids: expected one per label, got {len(ids)} for {len(labels)}.")
    # the released code sorts with NumPy's default, which leaves ties in any order (Q9)
    kind: Literal["quicksort", "stable"] = "quicksort" if mode == "official" else "stable"
    by_label = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[by_label], return_index=True)
    members = np.split(by_label, starts[1:])
    ranked = [positions[np.argsort(scores[positions], kind=kind)] for positions in members]
    if mode == "official" and split is not None:
        kept = official.flexrand(ranked, keep_fraction, split, seed)
    else:
        pick = SELECTORS[method].select
        kept = []
        for label, positions in zip(present.tolist(), ranked, strict=True):
            fraction = keep_fraction
            if mode == "default":
                fraction = _fraction_of_class(len(positions), keep_fraction, min_per_class)
            whole = fraction == 1
            kept.append(positions if whole else pick(positions, fraction, split, seed, label))
    indices = np.sort(np.concatenate(kept)).astype(np.int64)
    return Selection(
        indices=indices,
        method=method,
        keep_fraction=keep_fraction,
        split=split,
        seed=seed,
        mode=mode,
        min_per_class=min_per_class,
        num_kept_per_class=np.bincount(labels[indices], minlength=int(present[-1]) + 1),
        single_sample_classes=tuple(
            int(label)
            for label, positions in zip(present, members, strict=True)
            if len(positions) == 1
        ),
        labels_fingerprint=labels_fingerprint(labels),
        ids=None if ids is None else np.asarray(ids, np.str_)[indices],
    )


def _fraction_of_class(num_samples: int, keep_fraction: float, min_per_class: int) -> float:
    """Returns the fraction to keep of a class of this size; 1 keeps all of it."""
    if num_samples == 1:  # rounding would lose the class
        return 1.0
    least = min(min_per_class, num_samples)
    return keep_fraction if round(num_samples * keep_fraction) >= least else least / num_samples


def check_min_per_class(min_per_class: int, mode: str, name: str = "min_per_class") -> None:
    """Raises ValueError unless it is an integer >= 0, and 0 in mode `official`."""
    checks.integer(name, min_per_class)
    checks.at_least(name, min_per_class, 0)
    if min_per_class and mode == "official":
        raise checks.InputError(
            f"{name}: mode 'official' has none, expected 0, got {min_per_class!r}."
        )


def check_cell(
    method: str, keep_fraction: float, split: float | None, seed: int, mode: str
) -> float | None:
    """Returns the split to use (None for methods without one), or raises ValueError."""
    checks.mode(mode)
    checks.one_of("selection method", method, SELECTORS)
    checks.keep_fraction(keep_fraction)
    checks.seed(seed)
    if mode == "official":
        official.grid_cell(keep_fraction, DEFAULT_SPLIT if split is None else split)
    if not SELECTORS[method].has_split:
        if split is not None:
            raise checks.InputError(f"split: method {method!r} takes none, got {split!r}.")
        return None
    split = DEFAULT_SPLIT if split is None else split
    checks.split(split)
    return split
