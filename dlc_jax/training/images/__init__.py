"""Fine-tuning on kept images, step for step as PyTorch does it, and records of it."""

from dlc_jax.training.images.data import class_ids_by_name
from dlc_jax.training.images.finetune import finetune
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.record import record_training
from dlc_jax.training.images.recorder import Recorder, read_record
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig

__all__ = [
    "FinetuneConfig",
    "Finetuner",
    "RecordConfig",
    "Recorder",
    "class_ids_by_name",
    "finetune",
    "read_record",
    "record_training",
]
