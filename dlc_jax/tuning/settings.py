"""Settings of the stage `tune`."""

from __future__ import annotations

import dataclasses

from dlc_jax import expect
from dlc_jax.selection import SELECTORS
from dlc_jax.tuning.trials import TRIALS
from dlc_jax.tuning.tune import METHODS, NUM_REPEATS, SPLITS, check_tried
from dlc_jax.types import setting


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How `auto` is decided, and how much can be dropped, on held-out training data."""

    by: str = setting("linear_probe", f"what is trained: {', '.join(TRIALS)}")
    methods: tuple[str, ...] = setting(METHODS, "methods that are compared")
    splits: tuple[float, ...] = setting(SPLITS, "FlexRand's gammas that are compared")
    num_repeats: int = setting(
        NUM_REPEATS, "held-out fifths; five of them are the whole training set"
    )
    tolerance: float = setting(1.0, "points that may be lost against the full set")

    @property
    def needs_features(self) -> bool:
        """Whether linear heads are trained, or a method that is compared needs features."""
        return self.by == "linear_probe" or any(
            SELECTORS[method].needs == "features" for method in self.methods
        )

    def check(self) -> None:
        expect.one_of("tuning.by", self.by, TRIALS)
        check_tried(self.methods, self.splits, self.num_repeats, "tuning.")
        expect.at_least("tuning.tolerance", self.tolerance, 0)
