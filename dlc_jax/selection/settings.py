"""Every setting of a selection: methods by name, cells, rules, and what it takes to select."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dlc_jax import expect
from dlc_jax.scores import SCORES, column_name
from dlc_jax.selection import geometry, methods, neighbours, prototypes
from dlc_jax.selection.methods import ALLOCATIONS, Draw, Group, Positions
from dlc_jax.types import KEEP_FRACTIONS, Conventions, Selection, setting

AUTO = "auto"  # a method, or a split: what tuning found best
DEFAULT_METHOD, DEFAULT_SPLIT = "flexrand", 0.5
FULL = "full"  # no method: the run on all samples, which others are compared with


class Cell(NamedTuple):
    """One selection, or the training run on it; split is None where the method has none."""

    method: str
    keep_fraction: float
    split: float | str | None
    seed: int

    @property
    def name(self) -> str:
        """`flexrand/keep_0.30-split_0.50-seed_1`: where its files lie below a stage's folder."""
        parts = [f"keep_{_two_decimals(self.keep_fraction)}"]
        if self.split is not None:
            split = self.split if isinstance(self.split, str) else _two_decimals(self.split)
            parts.append(f"split_{split}")
        return f"{self.method}/{'-'.join([*parts, f'seed_{self.seed}'])}"

    def checked(self, conventions: Conventions) -> Cell:
        """Returns the cell with the split to use, None for methods without one; or ValueError."""
        method, keep_fraction, split, seed = self
        expect.one_of("selection method", method, [*SELECTORS, AUTO])
        expect.keep_fraction(keep_fraction)
        expect.seed(seed)
        if isinstance(split, str):
            check_split(split)
        if AUTO in (method, split) and conventions.draws_as_released:
            raise expect.InputError(
                f"mode {conventions.mode!r} has no {AUTO!r}; expected a method and a split."
            )
        if conventions.draws_as_released:
            known = conventions.keep_fractions
            methods.released_value("keep_fraction", keep_fraction, known)
        if not has_split(method):
            if split is not None:
                raise expect.InputError(f"split: method {method!r} takes none, got {split!r}.")
            return self
        split = DEFAULT_SPLIT if split is None else split
        if conventions.draws_as_released and not isinstance(split, str):
            methods.released_value("split", split, conventions.splits)
        check_split(split)
        return self._replace(split=split)


def _two_decimals(value: float) -> str:
    """Two decimals where they say it all, more where they are needed: names must not collide."""
    return f"{value:.2f}" if round(value, 2) == value else repr(value)


class Input(NamedTuple):
    """An array [n, d] that some methods need instead of scores.

    Attributes:
      check: Raises ValueError unless the array fits labels [n].
      source: Call that returns it, for messages.
      of: Source in the stage `score`: `encoder`, or a record of `training`.
      made_of: Name of the input that it is made of; None: of the samples.
      setting: Setting of `selection` that names what it takes besides; None: nothing.
    """

    check: Callable[[np.ndarray, np.ndarray], None]
    source: str
    of: str = "encoder"
    made_of: str | None = None
    setting: str | None = None


INPUTS: Mapping[str, Input] = {
    "features": Input(
        functools.partial(expect.features_fit_labels, "features"), "dlc.features(...)"
    ),
    "second_features": Input(
        functools.partial(expect.features_fit_labels, "second_features"),
        "dlc.features(...) of another encoder, for dlc.Candidates(..., inputs=...)",
        setting="second_encoder",
    ),
    "probabilities": Input(
        expect.probabilities_fit_labels, "dlc.record_training(...)", of="training"
    ),
    "similarities": Input(
        functools.partial(expect.features_fit_labels, "similarities"),
        "dlc.similarities(...), for dlc.Candidates(..., inputs=...)",
        made_of="features",
        setting="target",
    ),
}


class Method(NamedTuple):
    """A selector, and what it takes.

    Attributes:
      select: Picks from one class, or from all samples: returns `budget(group, draw)` different
        positions of the group, in any order.
      has_split: Whether it takes FlexRand's gamma.
      needs: What it needs, of `scores` and `INPUTS`.
      takes: Names of other inputs that it uses where they are given.
      variants: The published definition, and others.
      score: Name of the score it is meant for; None: any score.
    """

    select: Callable[[Group, Draw], Positions]
    has_split: bool = False
    needs: tuple[str, ...] = ("scores",)
    takes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("published",)
    score: str | None = None


VARIANTS = ("published", "deepcore", "paper")
_FROM_DRAWN = ("published", "paper")
_FEATURES = ("features",)

SELECTORS: Mapping[str, Method] = {
    "flexrand": Method(methods.flexrand, has_split=True),
    "easiest": Method(methods.easiest),
    "hardest": Method(methods.hardest),
    "middle": Method(methods.middle),
    "random": Method(methods.random, needs=()),
    "ccs": Method(methods.ccs),
    "ccs_herding": Method(geometry.ccs_herding, needs=("features", "scores")),
    "moderate": Method(geometry.moderate, needs=_FEATURES),
    "herding": Method(geometry.herding, needs=_FEATURES, variants=VARIANTS),
    "k_center_greedy": Method(geometry.k_center_greedy, needs=_FEATURES, variants=_FROM_DRAWN),
    "typical": Method(neighbours.typical, needs=_FEATURES),
    "subzerocore": Method(neighbours.subzerocore, needs=_FEATURES),
    "d2": Method(neighbours.d2, needs=("features", "scores")),
    "prototypes": Method(prototypes.prototypes, needs=_FEATURES),
    "ram_apl": Method(prototypes.ram_apl, needs=_FEATURES, takes=("second_features",)),
    "contextual_diversity": Method(
        geometry.contextual_diversity, needs=("probabilities",), variants=_FROM_DRAWN
    ),
    "least_confidence": Method(methods.most_uncertain, variants=VARIANTS, score="least_confidence"),
    "entropy": Method(methods.most_uncertain, variants=VARIANTS, score="entropy"),
    "margin": Method(methods.most_uncertain, variants=VARIANTS, score="margin"),
    "forgetting": Method(methods.hardest, score="forgetting"),
    "grand": Method(methods.hardest, score="grand"),
    "el2n": Method(methods.hardest, score="el2n"),
    "longest": Method(methods.hardest, score="length"),
    "rds": Method(methods.rds, needs=("similarities",)),
}


def has_split(method: str) -> bool:
    """Whether a method, or `auto`, takes FlexRand's gamma."""
    return method != AUTO and SELECTORS[method].has_split


def settings_of(method: str, takes: bool = False) -> set[str]:
    """Returns the settings behind the inputs that a method needs, or that it only takes."""
    of = SELECTORS.get(method, Method(methods.random, needs=()))
    names = of.takes if takes else of.needs
    return {said for name in names if name in INPUTS and (said := INPUTS[name].setting)}


def check_split(split: float | str, name: str = "split") -> None:
    """Raises ValueError unless the split is `auto` or in (0, 1)."""
    if not isinstance(split, str):
        expect.split(split, name)
    elif split != AUTO:
        raise expect.InputError(f"{name}: expected numbers or {AUTO!r}, got {split!r}.")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the samples of a cell are shared out among classes, and the variant of its method.

    Attributes:
      variant: `published`; `deepcore` copies that library's slip: `herding` takes the farthest
        sample, and with per_class=False `least_confidence`, `entropy` and `margin` keep the least
        uncertain. `paper`, as the baselines of Jiang et al. 2025 were run: those three always keep
        the least uncertain, `herding` takes the farthest sample, `k_center_greedy` and
        `contextual_diversity` start at a sample that is drawn.
      allocation: `proportional`: the fraction of each class. `nucs`: as many in all, but more of
        classes whose scores are higher. Not in `official`.
      per_class: False: round(n keep_fraction) out of all samples, whatever their classes, which may
        lose some; min_per_class must be 0. Not in `official`.
      min_per_class: Least samples kept of a class, all of a class that has no more; a class that
        this raises is selected from as at the keep fraction that gives as many. Not in `official`.
      max_similarity: Samples whose features have a cosine above it, in (0, 1), to another of their
        class are left out before anything is selected, all but one. As many are kept as without it,
        or all that are left, which may be fewer than min_per_class. None: none is left out. Not in
        `official`.
      leave_out_suspects: Whether samples that look mislabelled (see `suspect_labels`) are left out
        before anything is selected, and before near-duplicates are. Not in `official`.

    Example: `dlc.select(scores, labels, keep_fraction=0.1, rules=dlc.Rules(min_per_class=1))`.
    """

    variant: str = Selection.variant
    allocation: str = Selection.allocation
    per_class: bool = Selection.per_class
    min_per_class: int = Selection.min_per_class
    max_similarity: float | None = Selection.max_similarity
    leave_out_suspects: bool = Selection.leave_out_suspects

    def check(self, method: str, conventions: Conventions, where: str = "") -> None:
        """Raises ValueError unless the method, the conventions and the rules fit each other.

        Args:
          method: A method, or `auto`.
          conventions: What `mode` decides.
          where: Before the name of a number, in messages: `selection.` for a configuration's.
        """
        name = f"{where}min_per_class"
        expect.integer(name, self.min_per_class, 0)
        if self.min_per_class and conventions.draws_as_released:
            raise expect.InputError(
                f"{name}: mode {conventions.mode!r} has none, expected 0, got "
                f"{self.min_per_class!r}."
            )
        known = (Rules.variant,) if method == AUTO else SELECTORS[method].variants
        expect.one_of(f"variant of method {method!r}", self.variant, known)
        expect.one_of("allocation", self.allocation, ALLOCATIONS)
        if conventions.draws_as_released and not self._are_of_each_class:
            raise expect.InputError(
                f"mode {conventions.mode!r} has allocation='proportional' and per_class=True only, "
                f"got {self.allocation!r} and {self.per_class}."
            )
        if self.max_similarity is not None:
            expect.max_similarity(self.max_similarity, f"{where}max_similarity")
            if conventions.draws_as_released:
                raise expect.InputError(
                    f"{where}max_similarity: mode {conventions.mode!r} leaves nothing out, "
                    f"expected None, got {self.max_similarity!r}."
                )
        if self.leave_out_suspects and conventions.draws_as_released:
            raise expect.InputError(
                f"{where}leave_out_suspects: mode {conventions.mode!r} leaves nothing out, "
                "expected False, got True."
            )
        if not self.per_class and (self.allocation != Rules.allocation or self.min_per_class):
            raise expect.InputError(
                "per_class=False: allocation and min_per_class are about classes, expected "
                f"'proportional' and 0, got {self.allocation!r} and {self.min_per_class}."
            )

    def check_tunable(self) -> None:
        """Raises ValueError unless samples are shared out as `tune` does it."""
        if not self._are_of_each_class:
            raise expect.InputError(
                f"{AUTO}: is tuned with allocation='proportional' and per_class=True, got "
                f"{self.allocation!r} and {self.per_class}."
            )
        if self.max_similarity is not None or self.leave_out_suspects:
            raise expect.InputError(
                f"{AUTO}: is tuned on all samples; expected max_similarity None and "
                f"leave_out_suspects False with it, got {self.max_similarity!r} and "
                f"{self.leave_out_suspects}."
            )

    @property
    def _are_of_each_class(self) -> bool:
        """Whether the same fraction is kept of every class."""
        return self.per_class and self.allocation == Rules.allocation


# of methods, and of scores that methods use
_VARIANTS = tuple(dict.fromkeys([*VARIANTS, *(v for s in SCORES.values() for v in s.variants)]))


class Need(NamedTuple):
    """What the selected methods need, apart from DLC.

    Attributes:
      measured: Names of the inputs to measure with the encoder, such as `features`.
      training: A record of training on the whole set.
      tuning: What `auto` stands for.
    """

    measured: tuple[str, ...]
    training: bool
    tuning: bool


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which cells to select: methods x keep fractions x splits x seeds."""

    methods: tuple[str, ...] = setting((DEFAULT_METHOD,), f"{', '.join(SELECTORS)}, {AUTO}")
    keep_fractions: tuple[float, ...] = setting(KEEP_FRACTIONS, "fractions kept, each in (0, 1)")
    splits: tuple[float | str, ...] = setting(
        (DEFAULT_SPLIT,), f"FlexRand's gamma, each in (0, 1) or {AUTO}"
    )
    seeds: tuple[int, ...] = setting((0,), "seeds of the draws")
    score: str = setting("dlc", f"used by methods that name none: {', '.join(SCORES)}")
    variant: str = setting(Rules.variant, f"of methods or scores: {', '.join(_VARIANTS)}")
    allocation: str = setting(Rules.allocation, f"class budgets: {', '.join(ALLOCATIONS)}")
    per_class: bool = setting(
        Rules.per_class, "select from every class; False: from all samples at once"
    )
    min_per_class: int = setting(
        Rules.min_per_class, "least samples kept of a class (all, if it has no more)"
    )
    max_similarity: float | None = setting(
        None, "cosine above which near-duplicates are left out first, in (0, 1); None: none are"
    )
    leave_out_suspects: bool = setting(
        Rules.leave_out_suspects, "leave images that look mislabelled out first"
    )
    target: str | None = setting(
        None, "data that the samples of method rds should be like, as for dataset.train"
    )
    second_encoder: str | None = setting(
        None, "weights of another encoder that ram_apl asks too, or <name>=<weights>"
    )

    def check(self, conventions: Conventions) -> None:
        for key in ("methods", "keep_fractions", "splits", "seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise expect.InputError(
                    f"selection.{key}: expected one or more different values, got {values} "
                    "(a list given twice on the command line adds up)."
                )
        for method in self.methods:
            expect.one_of("selection.methods", method, [*SELECTORS, AUTO])
        for keep_fraction in self.keep_fractions:
            expect.keep_fraction(keep_fraction, "selection.keep_fractions")
        for split in self.splits:
            check_split(split, "selection.splits")
        for seed in self.seeds:
            expect.seed(seed, "selection.seeds")
        expect.one_of("selection.score", self.score, SCORES)
        self._check_variant()
        if ("target" in self._settings()) != (self.target is not None):
            raise expect.InputError(
                "selection.target: is what method 'rds' selects by; expected both or neither, got "
                f"{self.target!r} and methods {', '.join(self.methods)}."
            )
        if self.second_encoder is not None and "second_encoder" not in self._settings(takes=True):
            raise expect.InputError(
                "selection.second_encoder: is what method 'ram_apl' asks too; expected None "
                f"without it, got {self.second_encoder!r} and methods {', '.join(self.methods)}."
            )
        for cell in self.cells():
            cell.checked(conventions)
        for method in self.methods:
            self.rules_of(method).check(method, conventions, "selection.")
        if self.need.tuning:
            self.rules_of(AUTO).check_tunable()

    def _settings(self, takes: bool = False) -> set[str]:
        return set().union(*(settings_of(method, takes) for method in self.methods))

    def _check_variant(self) -> None:
        """Raises ValueError for a variant that nothing asked for has."""
        expect.one_of("selection.variant", self.variant, _VARIANTS)
        methods = [name for name in self.methods if name in SELECTORS]
        scores = dict.fromkeys([*map(self.score_name, methods), self.score])
        if self.variant == "paper" and "grand" in scores:
            raise expect.InputError(
                "selection.variant: 'paper' of grand takes gradients by all weights after the last "
                "epoch, which are not recorded; expected another variant, or methods without grand."
            )
        known = [v for name in methods for v in SELECTORS[name].variants]
        known += [v for name in scores for v in SCORES[name].variants]
        if self.variant not in known:
            raise expect.InputError(
                f"selection.variant: {self.variant!r} is a variant of none of the methods "
                f"{', '.join(self.methods)} and the scores {', '.join(scores)}; expected "
                f"{' or '.join(dict.fromkeys(known))}."
            )

    def cells(self) -> list[Cell]:
        """Returns every selection asked for."""
        return [
            Cell(method, keep_fraction, split, seed)
            for method in self.methods
            for keep_fraction in self.keep_fractions
            for split in (self.splits if has_split(method) else (None,))
            for seed in self.seeds
        ]

    def rules_of(self, method: str) -> Rules:
        """Returns the rules, with the variant asked for if the method has it."""
        known = SELECTORS[method].variants if method in SELECTORS else ()
        variant = self.variant if self.variant in known else Rules.variant
        return Rules(
            variant,
            self.allocation,
            self.per_class,
            self.min_per_class,
            self.max_similarity,
            self.leave_out_suspects,
        )

    def score_of(self, method: str) -> str:
        """Returns the column of `scores.parquet` that the method uses."""
        name = self.score_name(method)
        return column_name(name, self.variant) if self.variant in SCORES[name].variants else name

    def score_name(self, method: str) -> str:
        """Returns the score in `SCORES` that the method uses."""
        return (SELECTORS[method].score if method in SELECTORS else None) or self.score

    def how(self, method: str) -> dict[str, Any]:
        """Returns what decides a selection of this method besides its cell."""
        rules = dataclasses.asdict(self.rules_of(method))
        if self.max_similarity is None:  # which version 0.1 did not have
            del rules["max_similarity"]
        if not self.leave_out_suspects:
            del rules["leave_out_suspects"]
        names = settings_of(method) | settings_of(method, takes=True)
        of = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"score": self.score_of(method)} | rules | of

    def inputs_of(self, method: Method) -> list[str]:
        """Returns which of `INPUTS` a method needs, or takes where a setting names them."""
        names = [name for name in method.needs if name in INPUTS]
        return names + [
            name for name in method.takes if getattr(self, INPUTS[name].setting or "", None)
        ]

    @property
    def need(self) -> Need:
        """What the methods need, apart from DLC."""
        known = [SELECTORS[method] for method in self.methods if method in SELECTORS]
        names = {method.score or self.score for method in known} | {self.score}
        asked = [name for method in known for name in self.inputs_of(method)]
        asked += ["features"] if self.max_similarity is not None else []
        made_of = [INPUTS[name].made_of for name in asked]
        inputs = dict.fromkeys([*filter(None, made_of), *asked])  # the first are made first
        sources = {SCORES[name].of for name in names} | {INPUTS[name].of for name in inputs}
        return Need(
            measured=tuple(name for name in inputs if INPUTS[name].of == "encoder"),
            training="training" in sources,
            tuning=AUTO in self.methods or (AUTO in self.splits and "flexrand" in self.methods),
        )
