"""What is known of samples -> kept subset, per class or of all, within exact budgets."""

from dlc_jax.selection.candidates import Candidates, kept_positions, kept_rows, places_of, select
from dlc_jax.selection.methods import id_keys, lots
from dlc_jax.selection.settings import (
    AUTO,
    DEFAULT_SPLIT,
    FULL,
    INPUTS,
    SELECTORS,
    Cell,
    Need,
    Rules,
    SelectionConfig,
    has_split,
)
from dlc_jax.selection.similarity import most_similar, similarities
from dlc_jax.selection.suspects import SuspectLabels, informative_probes, suspect_labels
