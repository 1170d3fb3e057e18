"""Your own instructions, scored by a language model.

python -m dlc_jax.main --config=configs/instructions.py --config.dataset.train=jsonl:train.jsonl

Rows may be Alpaca's, Dolly's, GSM8K's, OpenOrca's, prompts with responses or completions, or
conversations (`messages`, ShareGPT's `conversations`), which the model's own chat template writes;
--config.dataset.columns="prompt=question,response=answer" is for other names.
Expected: runs/instructions/scores/easiest_hardest.md, and kept rows with all their fields in
runs/instructions/exports/. Eight probes spread over the path stand for its fifty.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stages = ("score", "select", "export")
    config.dataset.train = "jsonl:train.jsonl"
    config.encoder.name = "decoder"
    config.encoder.weights = "mistralai/Mistral-7B-v0.3"
    config.probe.dtype = "bfloat16"
    config.probe.num_probes = 8
    config.probe.placement = "midpoint"
    config.selection.methods = ("flexrand", "easiest", "hardest", "random")
    config.selection.keep_fractions = (0.1, 0.5, 0.9)
    config.export.forms = ("jsonl",)
    return config
