"""What a person looks at after a run."""

from dlc_jax.reports.correlations import what_dlc_adds
from dlc_jax.reports.figures import easiest_hardest, gap_to_random, mislabelled, tuning_figure
from dlc_jax.reports.results import read_results, results_table, summarise
from dlc_jax.reports.table import class_table, easiest_hardest_text, tuning_table
