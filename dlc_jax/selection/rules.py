"""How samples are shared out, whatever the method, keep fraction, split and seed."""

from __future__ import annotations

import dataclasses

from dlc_jax import checks
from dlc_jax.selection.allocation import ALLOCATIONS
from dlc_jax.selection.methods import AUTO, SELECTORS
from dlc_jax.types import Conventions, Selection


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the samples of a cell are shared out among classes, and the variant of its method.

    Attributes:
      variant: `published`; `deepcore` copies that library's slip: `herding` takes the farthest
        sample, and with per_class=False `least_confidence`, `entropy` and `margin` keep the least
        uncertain.
      allocation: `proportional`: the fraction of each class. `nucs`: as many in all, but more of
        classes whose scores are higher. Not in `official`.
      per_class: False: round(n keep_fraction) out of all samples, whatever their classes, which may
        lose some; min_per_class must be 0. Not in `official`.
      min_per_class: Least samples kept of a class, all of a class that has no more; a class that
        this raises is selected from as at the keep fraction that gives as many. Not in `official`.

    Example: `dlc.select(scores, labels, keep_fraction=0.1, rules=dlc.Rules(min_per_class=1))`.
    """

    variant: str = Selection.variant
    allocation: str = Selection.allocation
    per_class: bool = Selection.per_class
    min_per_class: int = Selection.min_per_class

    def check(self, method: str, conventions: Conventions, where: str = "") -> None:
        """Raises ValueError unless the method, the conventions and the rules fit each other.

        Args:
          method: A method, or `auto`.
          conventions: What `mode` decides.
          where: Before the name of a number, in messages: `selection.` for a configuration's.
        """
        name = f"{where}min_per_class"
        checks.integer(name, self.min_per_class, 0)
        if self.min_per_class and conventions.draws_as_released:
            raise checks.InputError(
                f"{name}: mode {conventions.mode!r} has none, expected 0, got "
                f"{self.min_per_class!r}."
            )
        known = (Rules.variant,) if method == AUTO else SELECTORS[method].variants
        checks.one_of(f"variant of method {method!r}", self.variant, known)
        checks.one_of("allocation", self.allocation, ALLOCATIONS)
        if conventions.draws_as_released and not self._are_of_each_class:
            raise checks.InputError(
                f"mode {conventions.mode!r} has allocation='proportional' and per_class=True only, "
                f"got {self.allocation!r} and {self.per_class}."
            )
        if not self.per_class and (self.allocation != Rules.allocation or self.min_per_class):
            raise checks.InputError(
                "per_class=False: allocation and min_per_class are about classes, expected "
                f"'proportional' and 0, got {self.allocation!r} and {self.min_per_class}."
            )

    def check_tunable(self) -> None:
        """Raises ValueError unless samples are shared out as `tune` does it."""
        if not self._are_of_each_class:
            raise checks.InputError(
                f"{AUTO}: is tuned with allocation='proportional' and per_class=True, got "
                f"{self.allocation!r} and {self.per_class}."
            )

    @property
    def _are_of_each_class(self) -> bool:
        """Whether the same fraction is kept of every class."""
        return self.per_class and self.allocation == Rules.allocation
