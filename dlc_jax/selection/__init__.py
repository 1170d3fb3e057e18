"""What is known of samples -> kept subset, per class or of all, within exact budgets."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dlc_jax import checks
from dlc_jax.selection import official
from dlc_jax.selection.allocation import ALLOCATIONS
from dlc_jax.selection.group import Draw, Group, Positions
from dlc_jax.selection.kept import kept_positions
from dlc_jax.selection.methods import (
    AUTO,
    DEFAULT_SPLIT,
    SELECTORS,
    VARIANTS,
    Cell,
    Method,
    check_cell,
    check_grouping,
    check_min_per_class,
    check_text_split,
    check_tunable,
    has_split,
)
from dlc_jax.types import (
    Choice,
    Selection,
    Tuning,
    features_fingerprint,
    labels_fingerprint,
    scores_fingerprint,
)

__all__ = [
    "ALLOCATIONS",
    "AUTO",
    "DEFAULT_SPLIT",
    "SELECTORS",
    "VARIANTS",
    "Cell",
    "Method",
    "check_cell",
    "check_grouping",
    "check_min_per_class",
    "check_text_split",
    "check_tunable",
    "has_split",
    "kept_positions",
    "select",
]


def select(
    scores: np.ndarray | None,
    labels: np.ndarray,
    *,
    method: str = "flexrand",
    keep_fraction: float,
    split: float | str | None = None,
    seed: int = 0,
    min_per_class: int = 0,
    mode: str = "default",
    ids: np.ndarray | None = None,
    features: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    variant: str = "published",
    allocation: str = "proportional",
    per_class: bool = True,
    tuning: Tuning | None = None,
) -> Selection:
    """Picks the samples to keep; every cell stands alone, whatever else is selected.

    Args:
      scores: [n] hardness, higher is harder; from `score`, `record_training` or your own. None
        where neither the method nor the allocation goes by it.
      labels: [n] non-negative class ids.
      method: By any score: `flexrand`, `easiest`, `hardest`, `ccs`. Highest first of the score of
        that name: `least_confidence`, `entropy`, `margin`, `forgetting`, `grand`, `el2n`. By
        features: `moderate`, `herding`, `k_center_greedy`. By probabilities:
        `contextual_diversity`. By nothing: `random`.
      keep_fraction: Fraction kept of each class, in (0, 1).
      split: FlexRand's gamma in (0, 1), the share of a class that counts as easy; default 0.5.
        `auto`: what `tuning` found best.
      seed: Seed of the draw; the draw of a class depends on (seed, class) alone.
      min_per_class: Least samples kept of a class, all of a class that has no more; a class that
        this raises is selected from as at the keep fraction that gives as many. Not in `official`.
      mode: `default`: exactly round(n_j keep_fraction) of a class of n_j samples, and its only
        sample where n_j is 1. `official`: the released code's draws, rounding and order of ties,
        for splits 0.05 i and keep fractions i / 10.
      ids: [n] sample ids; the selection then knows its samples by name, and `finetune` finds them
        in any order or part of the data set.
      features: [n, d] floating; what `features` returns, or your own.
      probabilities: [n, c] softmax outputs of a classifier; rows add up to 1.
      variant: `published`; `deepcore` copies that library's slip: `herding` takes the farthest
        sample, and with per_class=False `least_confidence`, `entropy` and `margin` keep the least
        uncertain.
      allocation: `proportional`: the fraction of each class. `nucs`: as many in all, but more of
        classes whose scores are higher. Not in `official`.
      per_class: False: round(n keep_fraction) out of all samples, whatever their classes, which may
        lose some; min_per_class must be 0. Not in `official`.
      tuning: From `tune`, on the same scores and labels; for `auto`, and only for it.
    Returns:
      Kept positions, ascending, with what made them.
    Raises:
      ValueError: unknown names, values out of range or off the official grid, an array that the
        method needs missing, numbers that are not finite, lengths that differ.
    Source: Jiang et al. 2025, section 4; of a method, where it is defined.
    """
    split = check_cell(method, keep_fraction, split, seed, mode)
    check_min_per_class(min_per_class, mode)
    check_grouping(method, variant, allocation, per_class, min_per_class, mode)
    labels = np.asarray(labels)
    if AUTO not in (method, split) and tuning is not None:
        raise checks.InputError(
            f"tuning: is for method or split {AUTO!r}, got method {method!r} and split {split!r}."
        )
    if AUTO in (method, split):
        check_tunable(allocation, per_class)
        choice = _choice(method, keep_fraction, scores, labels, min_per_class, tuning)
        if SELECTORS[choice.method].needs == "features":
            _check_features_are_tuned(features, tuning)
        selected = select(
            scores,
            labels,
            method=choice.method,
            keep_fraction=keep_fraction,
            split=choice.split,
            seed=seed,
            min_per_class=min_per_class,
            ids=ids,
            features=features,
        )
        return dataclasses.replace(selected, method=method, split=split, chosen=choice)
    assert not isinstance(split, str)  # it was `auto`
    scores, rows = _checked(method, allocation, labels, scores, features, probabilities)
    if ids is not None and len(ids) != len(labels):
        raise checks.InputError(f"ids: expected one per label, got {len(ids)} for {len(labels)}.")
    names, members = _members(labels if per_class else np.zeros_like(labels))
    if scores is not None and SELECTORS[method].needs == "scores":
        members = _ranked(members, scores, mode)
    if mode == "official" and split is not None:
        kept = official.flexrand(members, keep_fraction, split, seed)
    else:
        fractions = [keep_fraction] * len(members)
        if mode == "default" and per_class:
            fractions = ALLOCATIONS[allocation](members, scores, keep_fraction, min_per_class)
        kept = [
            positions
            if fraction == 1
            else SELECTORS[method].select(
                Group(positions, scores, rows),
                Draw(fraction, split, seed, name, per_class, variant),
            )
            for name, positions, fraction in zip(names, members, fractions, strict=True)
        ]
    indices = np.sort(np.concatenate(kept)).astype(np.int64)
    sizes = np.bincount(labels)
    return Selection(
        indices=indices,
        method=method,
        keep_fraction=keep_fraction,
        split=split,
        seed=seed,
        mode=mode,
        min_per_class=min_per_class,
        variant=variant,
        allocation=allocation,
        per_class=per_class,
        num_kept_per_class=np.bincount(labels[indices], minlength=len(sizes)),
        single_sample_classes=tuple(np.flatnonzero(sizes == 1).tolist()),
        labels_fingerprint=labels_fingerprint(labels),
        ids=None if ids is None else np.asarray(ids, np.str_)[indices],
    )


def _check_features_are_tuned(features: np.ndarray | None, tuning: Tuning | None) -> None:
    assert tuning is not None
    if features is not None and features_fingerprint(features) != tuning.features_fingerprint:
        raise checks.InputError(
            "tuning: was made from other features; expected those given to tune(...)."
        )


def _choice(
    method: str,
    keep_fraction: float,
    scores: np.ndarray | None,
    labels: np.ndarray,
    min_per_class: int,
    tuning: Tuning | None,
) -> Choice:
    """Returns what `auto` stands for."""
    if tuning is None or scores is None:
        raise checks.InputError(
            "tuning: 'auto' needs scores and tuning=dlc.tune(scores, labels, features=...)."
        )
    found = scores_fingerprint(scores, labels)
    if found != tuning.scores_fingerprint:
        raise checks.InputError(
            "tuning: was made from other scores or labels (their fingerprint is "
            f"{tuning.scores_fingerprint[:12]}, not {found[:12]}); expected tune(...) of these."
        )
    if min_per_class != tuning.min_per_class:
        raise checks.InputError(
            f"min_per_class: tuned with {tuning.min_per_class}, got {min_per_class}."
        )
    return tuning.choice(keep_fraction, of="methods" if method == AUTO else "splits")


_SOURCES = {
    "scores": "dlc.score(...)",
    "features": "dlc.features(...)",
    "probabilities": "dlc.record_training(...)",
}


def _checked(
    method: str,
    allocation: str,
    labels: np.ndarray,
    scores: np.ndarray | None,
    features: np.ndarray | None,
    probabilities: np.ndarray | None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the scores, and the features or probabilities if the method goes by them."""
    needs, score = SELECTORS[method].needs, SELECTORS[method].score
    given = {"scores": scores, "features": features, "probabilities": probabilities}
    if needs in given and given[needs] is None:
        source = _SOURCES[needs] if score is None else f"{score!r} of dlc.record_training(...)"
        raise checks.InputError(f"{needs}: method {method!r} goes by them; see {source}.")
    if allocation == "nucs" and scores is None:
        raise checks.InputError(
            f"scores: allocation 'nucs' goes by them; see {_SOURCES['scores']}."
        )
    checks.class_ids(labels)
    if scores is not None:
        scores = np.asarray(scores)
        checks.scores_fit_labels(scores, labels)
    if needs == "features":
        features = np.asarray(features)
        checks.features_fit_labels("features", features, labels)
        return scores, features
    if needs == "probabilities":
        probabilities = np.asarray(probabilities)
        checks.probabilities_fit_labels(probabilities, labels)
        return scores, probabilities
    return scores, None


def _members(labels: np.ndarray) -> tuple[list[int], list[Positions]]:
    """Returns the labels there are, and where the samples of each are, ascending."""
    by_label = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[by_label], return_index=True)
    return present.tolist(), np.split(by_label, starts[1:])


def _ranked(members: list[Positions], scores: np.ndarray, mode: str) -> list[Positions]:
    """Returns the positions easiest first."""
    # the released code sorts with NumPy's default, which leaves ties in any order (Q9)
    kind: Literal["quicksort", "stable"] = "quicksort" if mode == "official" else "stable"
    return [positions[np.argsort(scores[positions], kind=kind)] for positions in members]
