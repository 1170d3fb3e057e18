"""Coverage-centric selection: equally many samples from every stratum of the score range."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, Shaped

from dlc_jax.selection.group import Draw, Group, Positions, budget

_SHARE_DROPPED = 0.1  # beta, of the hardest
_NUM_STRATA = 50


def ccs(group: Group, draw: Draw) -> Positions:
    """Drops the hardest tenth of the group and draws evenly over the score range of the rest.

    floor(n / 10) samples are dropped, or fewer where the budget leaves fewer to drop. The range of
    the rest is cut into 50 strata of equal width; where all scores are equal, into one.

    Source: Zheng et al. 2023, Coverage-centric coreset selection for high pruning rates, alg. 1.
    """
    assert group.scores is not None
    num_samples, num_kept = len(group.positions), budget(group, draw)
    num_dropped = min(int(num_samples * _SHARE_DROPPED), num_samples - num_kept)
    rest = group.positions[: num_samples - num_dropped]
    strata = _strata(group.scores[rest])
    sizes = np.bincount(strata, minlength=_NUM_STRATA)
    ranks = group.ranks_by_lot(draw, "ccs")
    ranks = ranks[ranks < len(rest)]
    by_lot = strata[ranks]
    called = [
        np.flatnonzero(by_lot == k)[:num] for k, num in enumerate(even_budgets(sizes, num_kept))
    ]
    return rest[ranks[np.concatenate(called)]]


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
