"""Fine-tuning on kept images, step for step as PyTorch does it, and records of it."""

from dlc_jax.training.images.data import class_ids_by_name
from dlc_jax.training.images.finetuner import Finetuner, finetune
from dlc_jax.training.images.recorder import Recorder, read_record, record_training
from dlc_jax.training.images.settings import FinetuneConfig, RecordConfig
