"""Fine-tuning on a kept subset, step for step as PyTorch does it."""

from dlc_jax.training.finetune import finetune
from dlc_jax.training.finetuner import Finetuner
from dlc_jax.training.folder import ERROR, RunFolder
from dlc_jax.training.kept import kept_positions
from dlc_jax.training.settings import FinetuneConfig

__all__ = ["ERROR", "FinetuneConfig", "Finetuner", "RunFolder", "finetune", "kept_positions"]
