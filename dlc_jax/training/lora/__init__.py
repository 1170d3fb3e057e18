"""Fine-tuning of language models by low-rank changes, step for step as PEFT does it on torch."""

from dlc_jax.training.lora.finetune import finetune_lora
from dlc_jax.training.lora.settings import LoraConfig

__all__ = ["LoraConfig", "finetune_lora"]
