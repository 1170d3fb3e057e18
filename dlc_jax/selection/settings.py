"""Every setting of a selection, and what it takes to select."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dlc_jax import expect
from dlc_jax.scores import SCORES, column_name
from dlc_jax.selection.methods import (
    AUTO,
    DEFAULT_METHOD,
    DEFAULT_SPLIT,
    INPUTS,
    SELECTORS,
    VARIANTS,
    Cell,
    check_cell,
    check_split,
    has_split,
)
from dlc_jax.selection.rules import ALLOCATIONS, Rules
from dlc_jax.types import KEEP_FRACTIONS, Conventions, setting

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
        for cell in self.cells():
            check_cell(cell, conventions)
        for method in self.methods:
            self.rules_of(method).check(method, conventions, "selection.")
        if self.need.tuning:
            self.rules_of(AUTO).check_tunable()

    def _check_variant(self) -> None:
        """Raises ValueError for a variant that nothing asked for has."""
        expect.one_of("selection.variant", self.variant, _VARIANTS)
        methods = [name for name in self.methods if name in SELECTORS]
        scores = dict.fromkeys([*map(self.score_name, methods), self.score])
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
        return Rules(variant, self.allocation, self.per_class, self.min_per_class)

    def score_of(self, method: str) -> str:
        """Returns the column of `scores.parquet` that the method uses."""
        name = self.score_name(method)
        return column_name(name, self.variant) if self.variant in SCORES[name].variants else name

    def score_name(self, method: str) -> str:
        """Returns the score in `SCORES` that the method uses."""
        return (SELECTORS[method].score if method in SELECTORS else None) or self.score

    def how(self, method: str) -> dict[str, Any]:
        """Returns what decides a selection of this method besides its cell."""
        return {"score": self.score_of(method)} | dataclasses.asdict(self.rules_of(method))

    @property
    def need(self) -> Need:
        """What the methods need, apart from DLC."""
        known = [SELECTORS[method] for method in self.methods if method in SELECTORS]
        names = {method.score or self.score for method in known} | {self.score}
        inputs = dict.fromkeys(method.needs for method in known if method.needs in INPUTS)
        sources = {SCORES[name].of for name in names} | {INPUTS[name].of for name in inputs}
        return Need(
            measured=tuple(name for name in inputs if INPUTS[name].of == "encoder"),
            training="training" in sources,
            tuning=AUTO in self.methods or (AUTO in self.splits and "flexrand" in self.methods),
        )
