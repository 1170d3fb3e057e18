"""What several configuration files share, and what runs of them are called."""

from __future__ import annotations

import re
from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import expect
from dlc_jax.config import default_config
from dlc_jax.encoders.language_model import DECODER
from dlc_jax.reports.beside_paper import LANGUAGE_MODELS

DEFAULT_MODEL = "mistral-7b"


def run_name(configuration: str) -> str:
    """Returns `dolly-llama3-8b` of `configs/dolly.py:llama3-8b`: a folder for every choice."""
    file, _, choice = configuration.partition(":")
    suffix = f"-{choice}" if choice else ""
    return Path(file).stem + re.sub(r"[^\w.-]+", "_", suffix)


def paper_instructions(choice: str) -> ConfigDict:
    """Returns the paper's settings for instructions, all but `dataset.train`.

    Args:
      choice: A model in `LANGUAGE_MODELS`; followed by `,official`: the settings of the authors'
        released code instead.
    Raises:
      ValueError: an unknown model, or something else behind it.
    Source: Jiang et al. 2025, section 4; probes are 8 midpoints of its path instead of all 50.
    """
    model, _, mode = choice.partition(",")
    expect.one_of("model", model, LANGUAGE_MODELS)
    expect.one_of(f"what follows {model!r}", mode, ("", "official"))
    config = default_config()
    config.stages = ("score", "select", "export")
    config.encoder.name = DECODER
    config.encoder.weights = LANGUAGE_MODELS[model]
    config.probe.dtype = "bfloat16"
    config.selection.methods = ("flexrand", "random")
    config.selection.seeds = (1,)
    config.export.forms = ("jsonl",)
    if mode == "official":
        _as_released(config)
        return config
    config.probe.num_probes = 8
    config.probe.placement = "midpoint"
    # selection.keep_fractions: the default is the paper's
    return config


def _as_released(config: ConfigDict) -> None:
    """Puts in the settings of the authors' released code for instructions."""
    config.mode = "official"
    config.selection.keep_fractions = (0.5,)
    config.selection.splits = (0.25, 0.75)
    config.encoder.max_length = 1024  # of what is trained on
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q_proj", "v_proj")  # what PEFT takes for these models
    config.lora.loss_on = "text"
    config.lora.drop_last = True
    config.lora.optimiser = "adamw"
    config.lora.learning_rate = 5e-4
    config.lora.weight_decay = 5e-4
    config.lora.warmup_steps = 100
    config.lora.epochs = 1
    config.lora.batch_size = 4
