"""Fine-tuning on a kept subset, step for step as PyTorch does it."""

from dlc_jax.training.data import class_ids_by_name
from dlc_jax.training.finetune import finetune
from dlc_jax.training.finetuner import Finetuner
from dlc_jax.training.folder import ERROR, RunFolder
from dlc_jax.training.settings import FinetuneConfig

__all__ = ["ERROR", "FinetuneConfig", "Finetuner", "RunFolder", "class_ids_by_name", "finetune"]
