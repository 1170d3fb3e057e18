"""From samples to a selection, grouped and ranked once, and from it to positions in a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from dlc_jax import expect
from dlc_jax.scores import SCORES
from dlc_jax.selection.methods import ALLOCATIONS, Draw, Group, Known, flexrand_as_released, id_keys
from dlc_jax.selection.settings import AUTO, DEFAULT_METHOD, INPUTS, SELECTORS, Cell, Rules
from dlc_jax.selection.similarity import near_duplicates
from dlc_jax.types import (
    Choice,
    Conventions,
    Dataset,
    Selection,
    Tuning,
    features_fingerprint,
    labels_fingerprint,
    scores_fingerprint,
)

_SCORES = "dlc.score(...)"
_LeftOut = tuple[bool, float | None, bool]  # per_class, max_similarity, leave_out_suspects
_MEASURED = {"training": "dlc.record_training(...)", "responses": "dlc.measure_responses(...)"}


class Candidates:
    """Samples to pick from; sorted once for as many cells as are asked for.

    Lots are kept as well, of every seed 1 to 4 bytes a sample.

    Arrays are checked when a cell first needs them; do not change them afterwards.

    Args:
      scores, labels, ids, features, probabilities: As for `dlc_jax.select`.
      inputs: Other arrays of `INPUTS`, [n, d], by name.
      suspects: [n] which samples look mislabelled, for `Rules.leave_out_suspects`; from
        `suspect_labels`, or your own.
    Raises:
      ValueError: an unknown input, or one that is given twice.
    Example:
      >>> cosines = dlc.similarities(np.eye(3), np.array([[0.0, 1.0, 1.0]]))
      >>> candidates = dlc.Candidates(None, np.zeros(3, int), inputs={"similarities": cosines})
      >>> candidates.select(method="rds", keep_fraction=0.7).indices.tolist()
      [1, 2]
    """

    def __init__(
        self,
        scores: np.ndarray | None,
        labels: np.ndarray,
        *,
        ids: np.ndarray | None = None,
        features: np.ndarray | None = None,
        probabilities: np.ndarray | None = None,
        inputs: Mapping[str, np.ndarray] = {},
        suspects: Bool[np.ndarray, " n"] | None = None,
    ):
        given = {"scores": scores, "features": features, "probabilities": probabilities}
        for name in inputs:
            expect.one_of("inputs", name, INPUTS)
            if given.get(name) is not None:
                raise expect.InputError(f"inputs: {name!r} is given twice; expected it once.")
        given |= inputs
        self._given = {k: np.asarray(v) for k, v in given.items() if v is not None}
        self._given_labels, self._given_ids = np.asarray(labels), ids
        self._given_suspects = suspects
        self._groups_by: dict[tuple[tuple[str, ...], bool, bool], dict[int, Group]] = {}
        self._left_out_by: dict[_LeftOut, np.ndarray] = {}
        self._others_by: dict[tuple[tuple[str, ...], bool, _LeftOut], dict[int, Group]] = {}

    def select(
        self,
        *,
        method: str = DEFAULT_METHOD,
        keep_fraction: float,
        split: float | str | None = None,
        seed: int = 0,
        tuning: Tuning | None = None,
        mode: str = "default",
        kind: str = "images",
        rules: Rules = Rules(),
    ) -> Selection:
        """Picks the samples to keep in one cell; arguments and errors as for `dlc_jax.select`.

        Args:
          kind: The released code that mode `official` follows: that of `images`, or that of
            `instructions`, which has splits 0.25 and 0.75 and keep fraction 0.5 only.
        """
        conventions = Conventions.of(mode, kind)
        cell = Cell(method, keep_fraction, split, seed).checked(conventions)
        expect.is_a(Rules, rules=rules)
        rules.check(method, conventions)
        selector, gamma, chosen = method, cell.split, None
        if AUTO in (method, gamma):
            rules.check_tunable()
            chosen = self._choice(cell, rules.min_per_class, tuning)
            selector, gamma = chosen.method, chosen.split
        elif tuning is not None:
            raise expect.InputError(
                f"tuning: is for method or split {AUTO!r}, got method {method!r} and split "
                f"{gamma!r}."
            )
        assert not isinstance(gamma, str)  # it was `auto`
        self._check_all_there(selector, rules)
        as_released = conventions.draws_as_released
        # what `auto` stands for was tuned by what it needs alone
        used = self._used(selector) if chosen is None else SELECTORS[selector].needs
        by = (used, rules.per_class, as_released)
        groups = self._groups(*by)
        members = [group.positions for group in groups.values()]
        num_left_out = num_short = 0
        if as_released and gamma is not None:
            kept = flexrand_as_released(members, keep_fraction, gamma, seed, conventions)
        else:
            fractions = [keep_fraction] * len(members)
            if rules.per_class and not as_released:
                allocated = ALLOCATIONS[rules.allocation]
                fractions = allocated(members, self._scores, keep_fraction, rules.min_per_class)
            kept = []
            others = self._others(*by, rules)
            for (label, group), fraction in zip(others.items(), fractions, strict=True):
                num_all, num = len(groups[label].positions), len(group.positions)
                if num < num_all:
                    num_asked = round(num_all * fraction)
                    num_left_out += num_all - num
                    num_short += max(num_asked - num, 0)
                    if num == 0:
                        continue
                    fraction = min(1.0, num_asked / num)
                draw = Draw(fraction, gamma, seed, label, rules.per_class, rules.variant)
                whole = fraction == 1
                kept.append(group.positions if whole else SELECTORS[selector].select(group, draw))
        is_kept = np.zeros(len(self._labels), bool)  # sorts as it is read
        for some in kept:
            is_kept[some] = True
        indices = np.flatnonzero(is_kept).astype(np.int64)
        sizes = np.bincount(self._labels)
        return Selection(
            indices=indices,
            **cell._asdict(),
            mode=mode,
            **dataclasses.asdict(rules),
            num_left_out=num_left_out,
            num_short=num_short,
            chosen=chosen,
            num_kept_per_class=np.bincount(self._labels[indices], minlength=len(sizes)),
            single_sample_classes=tuple(np.flatnonzero(sizes == 1).tolist()),
            labels_fingerprint=self._labels_fingerprint,
            ids=None if self._ids is None else self._ids[indices],
            scored_ids=self._ids,
        )

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        expect.class_ids(self._given_labels)
        return self._given_labels

    @functools.cached_property
    def _labels_fingerprint(self) -> str:
        return labels_fingerprint(self._labels)

    @functools.cached_property
    def _ids(self) -> np.ndarray | None:
        ids, num = self._given_ids, len(self._given_labels)
        if ids is not None and len(ids) != num:
            raise expect.InputError(f"ids: expected one per label, got {len(ids)} for {num}.")
        return None if ids is None else expect.as_ids("ids", ids)

    @functools.cached_property
    def _keys(self) -> np.ndarray | None:
        return None if self._ids is None else id_keys(self._ids)

    @functools.cached_property
    def _by_id(self) -> np.ndarray:
        """[n] positions, in an order that only the ids decide."""
        assert self._ids is not None
        assert self._keys is not None
        order = np.argsort(self._keys)
        in_order = self._keys[order]
        if np.any(in_order[1:] == in_order[:-1]):
            expect.no_repetition("ids", self._ids)
            order = np.lexsort((self._ids, self._keys))
        return order

    @functools.cached_property
    def _scores(self) -> np.ndarray | None:
        if (scores := self._given.get("scores")) is not None:
            expect.scores_fit_labels(scores, self._labels)
        return scores

    @functools.cached_property
    def _known(self) -> Known:
        inputs = {name: rows for name, rows in self._given.items() if name in INPUTS}
        return Known(self._labels, self._scores, inputs)

    @functools.cached_property
    def _known_with_keys(self) -> Known:
        return dataclasses.replace(self._known, keys=self._keys)

    @functools.cached_property
    def _scores_fingerprint(self) -> str:
        return scores_fingerprint(self._given["scores"], self._given_labels)

    @functools.cached_property
    def _features_fingerprint(self) -> str:
        return features_fingerprint(self._given["features"])

    @functools.cached_property
    def _suspects(self) -> Bool[np.ndarray, " n"]:
        suspects = np.asarray(self._given_suspects)
        if suspects.shape != self._labels.shape or suspects.dtype != bool:
            raise expect.InputError(
                f"suspects: expected a truth value per label, {len(self._labels)} in all, got "
                f"{suspects.dtype} {suspects.shape}."
            )
        return suspects

    def _check_all_there(self, method: str, rules: Rules) -> None:
        score = SELECTORS[method].score
        for name in SELECTORS[method].needs:
            if name not in self._given:
                source = INPUTS[name].source if name in INPUTS else _SCORES
                if score is not None:
                    source = f"{score!r} of {_MEASURED[SCORES[score].of]}"
                raise expect.InputError(f"{name}: method {method!r} needs them; see {source}.")
        if rules.allocation == "nucs" and "scores" not in self._given:
            raise expect.InputError(f"scores: allocation 'nucs' needs them; see {_SCORES}.")
        if rules.max_similarity is not None and "features" not in self._given:
            source = INPUTS["features"].source
            raise expect.InputError(f"features: max_similarity needs them; see {source}.")
        if rules.leave_out_suspects and self._given_suspects is None:
            raise expect.InputError(
                "suspects: leave_out_suspects needs them; see dlc.suspect_labels(...), for "
                "dlc.Candidates(..., suspects=found.is_suspect)."
            )

    def _used(self, method: str) -> tuple[str, ...]:
        """Returns the names of what a method uses of what was given."""
        of = SELECTORS[method]
        return *of.needs, *(name for name in of.takes if name in self._given)

    def _groups(
        self, used: tuple[str, ...], per_class: bool, as_released: bool
    ) -> dict[int, Group]:
        """Returns the samples of each label there is, or all as those of label 0.

        Args:
          used: `scores`, which then decide their order, and which of `INPUTS`.
          per_class: Whether each class is a group.
          as_released: Whether they are drawn and sorted as the released code does it.
        """
        key = (used, per_class, as_released)
        if key not in self._groups_by:
            scores = self._scores
            inputs = tuple(name for name in used if name in INPUTS)
            for name in inputs:
                INPUTS[name].check(self._given[name], self._labels)
            labels = self._labels if per_class else np.zeros_like(self._labels)
            # the released code draws, and breaks ties, by position
            keys = None if as_released else self._keys
            if keys is None:
                by_label = np.argsort(labels, kind="stable")
            else:
                by_label = self._by_id[np.argsort(labels[self._by_id], kind="stable")]
            present, starts = np.unique(labels[by_label], return_index=True)
            members = np.split(by_label, starts[1:])
            if "scores" in used:
                assert scores is not None
                # the released code sorts with NumPy's default, which leaves ties in any order (Q9)
                stable = None if as_released else True
                members = [some[np.argsort(scores[some], stable=stable)] for some in members]
            known = self._known if as_released else self._known_with_keys
            groups = [Group(positions, known, inputs) for positions in members]
            self._groups_by[key] = dict(zip(present.tolist(), groups, strict=True))
        return self._groups_by[key]

    def _others(
        self, used: tuple[str, ...], per_class: bool, as_released: bool, rules: Rules
    ) -> dict[int, Group]:
        """Returns what `_groups` does, without what the rules leave out."""
        groups = self._groups(used, per_class, as_released)
        which = (per_class, rules.max_similarity, rules.leave_out_suspects)
        if which[1:] == (None, False):
            return groups
        key = (used, as_released, which)
        if key not in self._others_by:
            is_left_out = self._left_out(which)
            self._others_by[key] = {
                label: dataclasses.replace(
                    group, positions=group.positions[~is_left_out[group.positions]]
                )
                for label, group in groups.items()
            }
        return self._others_by[key]

    def _left_out(self, which: _LeftOut) -> Bool[np.ndarray, " n"]:
        """Returns which samples are left out: suspects, then near-duplicates within a group."""
        if which not in self._left_out_by:
            per_class, limit, without_suspects = which
            is_left_out = np.zeros(len(self._labels), bool)
            if without_suspects:
                is_left_out |= self._suspects
            groups = {} if limit is None else self._groups(("features",), per_class, False)
            for group in groups.values():  # all pairs are compared
                assert limit is not None
                positions = group.positions[~is_left_out[group.positions]]
                if len(positions):
                    doubles = near_duplicates(group.rows, positions, limit)
                    is_left_out[positions[doubles]] = True
            self._left_out_by[which] = is_left_out
        return self._left_out_by[which]

    def _choice(self, cell: Cell, min_per_class: int, tuning: Tuning | None) -> Choice:
        """Returns what `auto` stands for."""
        if tuning is None or "scores" not in self._given:
            raise expect.InputError(
                "tuning: 'auto' needs scores and tuning=dlc.tune(scores, labels, features=...)."
            )
        found = self._scores_fingerprint
        if found != tuning.scores_fingerprint:
            raise expect.InputError(
                "tuning: was made from other scores or labels (their fingerprint is "
                f"{tuning.scores_fingerprint[:12]}, not {found[:12]}); expected tune(...) of these."
            )
        if min_per_class != tuning.min_per_class:
            raise expect.InputError(
                f"min_per_class: tuned with {tuning.min_per_class}, got {min_per_class}."
            )
        choice = tuning.choice(
            cell.keep_fraction, of="methods" if cell.method == AUTO else "splits"
        )
        if (
            "features" in self._given
            and "features" in SELECTORS[choice.method].needs
            and self._features_fingerprint != tuning.features_fingerprint
        ):
            raise expect.InputError(
                "tuning: was made from other features; expected those given to tune(...)."
            )
        return choice


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
      method: By any score: `flexrand`, `easiest`, `hardest`, `middle`, `ccs`. Highest first of the
        score of that name: `least_confidence`, `entropy`, `margin`, `forgetting`, `grand`, `el2n`;
        `longest` of `length`. By features: `moderate`, `herding`, `k_center_greedy`, `typical`,
        `subzerocore`, `prototypes`, `ram_apl`. By both: `d2`, `ccs_herding`. By probabilities:
        `contextual_diversity`. By nothing: `random`. By what only `dlc.Candidates` takes: `rds`, by
        similarities to targets; `ram_apl` by features of a second encoder too.
      keep_fraction: Fraction kept of each class, in (0, 1).
      split: FlexRand's gamma in (0, 1), the share of a class that counts as easy; default 0.5.
        `auto`: what `tuning` found best.
      seed: Seed of the draw. The draw of a class depends on the seed, its class id and its samples
        only.
      ids: [n] different sample ids. Draws and ties then follow the ids, so that the same samples
        in another order keep the same ids (not in `official`), and `finetune` finds the kept
        samples in any order or part of the data set. None: draws and ties follow positions.
      features: [n, d] floating; what `features` returns, or your own.
      probabilities: [n, c] softmax outputs of a classifier; rows add up to 1.
      tuning: From `tune`, on the same scores and labels; for `auto`, and only for it.
      mode: `default`: exactly round(n_j keep_fraction) of a class of n_j samples, and its only
        sample where n_j is 1. `official`: the released code's draws, rounding and order of ties,
        for splits 0.05 i and keep fractions i / 10. For instructions the authors released another,
        of `dlc.Candidates(...).select(..., mode="official", kind="instructions")`.
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


def kept_positions(
    dataset: Dataset, kept: Selection | np.ndarray | Sequence[int] | None
) -> Int64[np.ndarray, " k"]:
    """Returns the kept positions in the data set, ascending; all of them for None.

    Raises:
      ValueError: they are empty, out of range or repeated, or the selection was made from another
        data set: from other labels or, where it knows its ids, with ids the data set has not.
    """
    positions = kept_rows(dataset.name, dataset.ids, kept, dataset.labels)
    if not isinstance(kept, Selection):
        return positions
    num_kept = np.bincount(dataset.labels[positions], minlength=dataset.num_classes)
    expected = np.zeros_like(num_kept)
    expected[: len(kept.num_kept_per_class)] = kept.num_kept_per_class[: len(expected)]
    if not np.array_equal(num_kept, expected):
        label = int(np.flatnonzero(num_kept != expected)[0])
        raise expect.InputError(
            f"kept: {num_kept[label]} samples are of class {dataset.class_names[label]!r} in "
            f"{dataset.name}, but the selection has {expected[label]}: it was made from another "
            "data set."
        )
    return positions


def kept_rows(
    name: str,
    ids: np.ndarray,
    kept: Selection | np.ndarray | Sequence[int] | None,
    labels: np.ndarray | None = None,
) -> Int64[np.ndarray, " k"]:
    """Returns the kept positions among samples that have no classes; see `kept_positions`.

    Args:
      name: What the samples are called in messages.
      ids: [n] sample ids.
      kept: A selection that knows its ids, positions, or None for all.
      labels: [n] class ids, from which a selection without ids must have been made; None: any.
    """
    if kept is None:
        return np.arange(len(ids))
    if not isinstance(kept, Selection):
        given = np.asarray(kept)
        expect.positions("kept", given, len(ids))
        return np.sort(given).astype(np.int64)
    if len(kept) == 0:
        raise expect.InputError(
            f"kept: {kept.method} at keep fraction {kept.keep_fraction:g} keeps no sample (budgets "
            "are rounded in every class); expected one or more."
        )
    if kept.ids is not None:
        expect.no_repetition("kept.ids", kept.ids)
        return np.sort(places_of(name, ids, kept.ids))
    made_from = kept.labels_fingerprint
    found = None if labels is None else labels_fingerprint(labels)
    if found and made_from and made_from != found:
        raise expect.InputError(
            f"kept: selected from other labels than those of {name} (their fingerprint is "
            f"{made_from[:12]}, not {found[:12]}); expected a selection from this data set, in "
            "its order, or one made with select(..., ids=...)."
        )
    expect.positions("kept.indices", kept.indices, len(ids))
    return np.sort(kept.indices)


def places_of(
    name: str, ids: np.ndarray, wanted: np.ndarray, part: str = "kept"
) -> Int64[np.ndarray, " k"]:
    """Returns the positions of samples by their ids, in the order asked for.

    Args:
      name: Name of the data set, for messages.
      ids: [n] sample ids of the data set.
      wanted: [k] some of them.
      part: `kept` or `dropped`, for messages.
    Raises:
      ValueError: some are not there.
    """
    places = {sample: position for position, sample in enumerate(ids.tolist())}
    unknown = [sample for sample in wanted.tolist() if sample not in places]
    if unknown:
        raise expect.InputError(
            f"kept: {len(unknown)} of {len(wanted)} {part} samples are not in {name}, first "
            f"{unknown[0]!r}: the selection was made from another data set."
        )
    return np.array([places[sample] for sample in wanted.tolist()], np.int64)
