"""Fine-tuning on a kept subset, step for step as PyTorch does it, and records of it."""

from dlc_jax.training.data import class_ids_by_name
from dlc_jax.training.finetune import finetune
from dlc_jax.training.finetuner import Finetuner
from dlc_jax.training.folder import ERROR, RunFolder
from dlc_jax.training.record import record_training
from dlc_jax.training.recorder import Recorder, read_record
from dlc_jax.training.settings import FinetuneConfig, RecordConfig
from dlc_jax.types import TrainingRecord

__all__ = [
    "ERROR",
    "FinetuneConfig",
    "Finetuner",
    "RecordConfig",
    "Recorder",
    "RunFolder",
    "TrainingRecord",
    "class_ids_by_name",
    "finetune",
    "read_record",
    "record_training",
]
