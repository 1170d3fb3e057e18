"""What several configuration files share, and what runs of them are called."""

from __future__ import annotations

import re
from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import expect
from dlc_jax.config import default_config
from dlc_jax.encoders.language_model import DECODER

# base models of the paper -> hub ids
LANGUAGE_MODELS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "gemma2-9b": "google/gemma-2-9b",
}
DEFAULT_MODEL = "mistral-7b"


def run_name(configuration: str) -> str:
    """Returns `dolly-llama3-8b` of `configs/dolly.py:llama3-8b`: a folder for every choice."""
    file, _, choice = configuration.partition(":")
    suffix = f"-{choice}" if choice else ""
    return Path(file).stem + re.sub(r"[^\w.-]+", "_", suffix)


def paper_instructions(model: str) -> ConfigDict:
    """Returns the paper's settings for instructions, all but `dataset.train`.

    Args:
      model: In `LANGUAGE_MODELS`.
    Raises:
      ValueError: an unknown model.
    Source: Jiang et al. 2025, section 4; probes are 8 midpoints of its path instead of all 50.
    """
    expect.one_of("model", model, LANGUAGE_MODELS)
    config = default_config()
    config.stages = ("score", "select", "export")
    config.encoder.name = DECODER
    config.encoder.weights = LANGUAGE_MODELS[model]
    config.probe.dtype = "bfloat16"
    config.probe.num_probes = 8
    config.probe.placement = "midpoint"
    config.selection.methods = ("flexrand", "random")
    config.selection.seeds = (1,)
    config.export.forms = ("jsonl",)
    # selection.keep_fractions: the default is the paper's
    return config
