"""What language models are evaluated on."""

from __future__ import annotations

import dataclasses

from dlc_jax import checks
from dlc_jax.types import setting


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """MMLU, as lm_eval's task of that name asks it.

    Source: Hendrycks et al. 2021, arXiv 2009.03300.
    """

    mmlu: str | None = setting(None, "mmlu:<folder with dev/ and test/ of CSV files> or demo:mmlu")
    num_shots: int = setting(5, "solved questions before each one")
    limit: int | None = setting(None, "only so many questions of each subject; None: all")

    def check(self, where: str = "evaluation.") -> None:
        """Raises ValueError unless all values are in range; `where` is put before their names."""
        checks.integer(f"{where}num_shots", self.num_shots, 0)
        if self.limit is not None:
            checks.integer(f"{where}limit", self.limit, 1)
