"""What a person looks at after a run."""

from dlc_jax.reports.figures import easiest_hardest, gap_to_random
from dlc_jax.reports.instructions import easiest_hardest_text
from dlc_jax.reports.results import read_results, results_table, summarise
from dlc_jax.reports.table import class_table
from dlc_jax.reports.tuning import tuning_figure, tuning_table
