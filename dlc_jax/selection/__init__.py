"""What is known of samples -> kept subset, per class or of all, within exact budgets."""

from __future__ import annotations

import numpy as np

from dlc_jax.selection.candidates import Candidates
from dlc_jax.selection.group import id_keys, lots
from dlc_jax.selection.kept import kept_positions
from dlc_jax.selection.methods import (
    AUTO,
    DEFAULT_METHOD,
    DEFAULT_SPLIT,
    FULL,
    INPUTS,
    SELECTORS,
    Cell,
    has_split,
)
from dlc_jax.selection.rules import Rules
from dlc_jax.types import Selection, Tuning


def select(
    scores: np.ndarray | None,
    labels: np.ndarray,
    *,
    method: str = DEFAULT_METHOD,
    keep_fraction: float,
    split: float | str | None = None,
    seed: int = 0,
    ids: np.ndarray | None = None,
    features: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    tuning: Tuning | None = None,
    mode: str = "default",
    rules: Rules = Rules(),
) -> Selection:
    """Picks the samples to keep; every cell stands alone, whatever else is selected.

    `Candidates` does the same for many cells of large data sets, sorts them once, and takes
    arrays of all `INPUTS`.

    Args:
      scores: [n] hardness, higher is harder; from `score`, `record_training` or your own. None
        where neither the method nor the allocation uses them.
      labels: [n] non-negative class ids.
      method: By any score: `flexrand`, `easiest`, `hardest`, `ccs`. Highest first of the score of
        that name: `least_confidence`, `entropy`, `margin`, `forgetting`, `grand`, `el2n`. By
        features: `moderate`, `herding`, `k_center_greedy`. By probabilities:
        `contextual_diversity`. By nothing: `random`.
      keep_fraction: Fraction kept of each class, in (0, 1).
      split: FlexRand's gamma in (0, 1), the share of a class that counts as easy; default 0.5.
        `auto`: what `tuning` found best.
      seed: Seed of the draw. The draw of a class depends on the seed and its samples only.
      ids: [n] different sample ids. Draws and ties then follow the ids, so that the same samples
        in another order keep the same ids (not in `official`), and `finetune` finds the kept
        samples in any order or part of the data set. None: draws and ties follow positions.
      features: [n, d] floating; what `features` returns, or your own.
      probabilities: [n, c] softmax outputs of a classifier; rows add up to 1.
      tuning: From `tune`, on the same scores and labels; for `auto`, and only for it.
      mode: `default`: exactly round(n_j keep_fraction) of a class of n_j samples, and its only
        sample where n_j is 1. `official`: the released code's draws, rounding and order of ties,
        for splits 0.05 i and keep fractions i / 10.
      rules: Budgets of classes, and the method's variant; see `Rules`.
    Returns:
      Kept positions, ascending, with what made them.
    Raises:
      ValueError: unknown names, values out of range or off the official grid, an array that the
        method needs missing, numbers that are not finite, lengths that differ, repeated ids.
    Source: Jiang et al. 2025, section 4; of a method, where it is defined.
    Example:
      >>> scores, labels = np.array([3.0, 1.0, 2.0, 4.0]), np.array([0, 0, 1, 1])
      >>> dlc.select(scores, labels, method="easiest", keep_fraction=0.5).indices.tolist()
      [1, 2]
    """
    candidates = Candidates(scores, labels, ids=ids, features=features, probabilities=probabilities)
    return candidates.select(
        method=method,
        keep_fraction=keep_fraction,
        split=split,
        seed=seed,
        tuning=tuning,
        mode=mode,
        rules=rules,
    )
