"""Importance of weights, sparsity schedules, and exact masks that are never stored."""

from dlc_jax.masking.importance import Importance, prunable_paths, weight_importance
from dlc_jax.masking.path_spec import PathSpec
from dlc_jax.masking.schedules import AUTO, refinements
from dlc_jax.masking.thresholds import Thresholds, exact_thresholds, masked
from dlc_jax.masking.torch_ties import removal_steps

__all__ = [
    "AUTO",
    "Importance",
    "PathSpec",
    "Thresholds",
    "exact_thresholds",
    "masked",
    "prunable_paths",
    "refinements",
    "removal_steps",
    "weight_importance",
]
