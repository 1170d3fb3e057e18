"""What one score says beyond others: rank correlations, alone and at equal values of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Shaped

_FEWEST = 5  # samples; of fewer, nothing is left once two scores are known
_NOTHING = 1e-9  # share of variance that is rounding


def partial_rank_correlation(
    a: Shaped[np.ndarray, " n"],
    b: Shaped[np.ndarray, " n"],
    given: Sequence[Shaped[np.ndarray, " n"]] = (),
) -> float:
    """Returns Spearman's correlation of two scores, in [-1, 1], at equal ranks in others.

    It is that of what a linear regression on the ranks of the others leaves of their ranks; not a
    number where that is nothing. Equal values have their mean rank.

    Args:
      a: Score of each sample.
      b: Another one.
      given: Those that are held equal.
    Source: Kendall 1942, Partial rank correlation; in the form of residuals.
    """
    a_left, b_left = (_left(_ranks(score), given) for score in (a, b))
    size = float(np.linalg.norm(a_left) * np.linalg.norm(b_left))
    return float(a_left @ b_left) / size if size else float("nan")


def share_beyond(
    score: Shaped[np.ndarray, " n"], others: Sequence[Shaped[np.ndarray, " n"]]
) -> float:
    """Returns which share of the variance of a score's ranks a regression on others' leaves."""
    ranks = _ranks(score)
    total = float(ranks @ ranks)
    left = _left(ranks, others)
    return float(left @ left) / total if total else float("nan")


def what_dlc_adds(scores: Mapping[str, Shaped[np.ndarray, " n"]]) -> str:
    """Returns a line on what the ranking by DLC has beyond perplexity and length.

    Args:
      scores: By column; "" is returned where these three are not all there, one is the same for all
        samples, or samples are few.
    """
    if not {"dlc", "perplexity", "length"} <= scores.keys() or len(scores["dlc"]) < _FEWEST:
        return ""
    dlc, perplexity, length = (scores[name] for name in ("dlc", "perplexity", "length"))
    if any(np.ptp(score) == 0 for score in (dlc, perplexity, length)):
        return ""  # what is the same everywhere ranks nothing
    parts = []
    for name, one, held, other in (
        ("perplexity", perplexity, "length", length),
        ("length", length, "perplexity", perplexity),
    ):
        at_equal = partial_rank_correlation(dlc, one, [other])
        left = f"{at_equal:.2f} at" if np.isfinite(at_equal) else "nothing is left at"
        parts.append(f"{name} {partial_rank_correlation(dlc, one):.2f} ({left} equal {held})")
    share = share_beyond(dlc, [perplexity, length])
    return (
        f"Spearman's correlation of DLC with {', with '.join(parts)}; {share:.0%} of its ranking "
        "is in neither"
    )


def _ranks(score: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns ranks with mean 0."""
    from scipy.stats import rankdata  # a second, which every command would wait for

    ranks = rankdata(score)
    return ranks - ranks.mean()


def _left(
    ranks: Float64[np.ndarray, " n"], given: Sequence[Shaped[np.ndarray, " n"]]
) -> Float64[np.ndarray, " n"]:
    """Returns what a regression on the ranks of others leaves; 0 where that is rounding."""
    if not given:
        return ranks
    others = np.stack([_ranks(score) for score in given], axis=1)
    left = ranks - others @ np.linalg.lstsq(others, ranks, rcond=None)[0]
    is_nothing = left @ left <= _NOTHING * (ranks @ ranks)
    return np.zeros_like(left) if is_nothing else left
