"""What a person looks at after a run."""

from dlc_jax.reports.picture import easiest_hardest
from dlc_jax.reports.table import class_table

__all__ = ["class_table", "easiest_hardest"]
