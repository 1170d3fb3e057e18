"""Fine-tuning of language models by low-rank changes, step for step as PEFT does it on torch."""

from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.tuner import finetune_lora
