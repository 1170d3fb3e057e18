"""Importance of weights, sparsity schedules, and exact masks that are never stored."""

from dlc_jax.masking.by_layer import masked_by_layer
from dlc_jax.masking.path_spec import AUTO, PathSpec, refinements
from dlc_jax.masking.thresholds import (
    Importance,
    Thresholds,
    deferred_masks,
    exact_thresholds,
    masked,
    masked_text,
    prunable_paths,
    weight_importance,
)
from dlc_jax.masking.torch_ties import removal_steps
