"""Prunes 400 bundled instructions by a small bundled language model; no network.

python -m dlc_jax.main --config=configs/instructions_demo.py

Scores by 4 probes, selects, fine-tunes adapters with AdamW (at the paper's rate a few steps move
nothing), measures the loss of 100 other responses and asks 5-shot MMLU questions. The model has
3 million weights and writes words, not sense: accuracies are those of guessing. Expected: five
minutes on two cores; runs/instructions_demo/report/results.md.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stages = ("score", "select", "export", "finetune", "evaluate", "report")
    config.dataset.train = "demo:dolly/train"
    config.dataset.test = "demo:dolly/test"
    config.dataset.on_corrupt = "skip"
    config.encoder.name = "decoder"
    config.encoder.weights = "demo:tiny-llama"
    config.encoder.max_length = 512
    config.probe.num_probes = 4
    config.probe.placement = "midpoint"
    config.selection.methods = ("flexrand", "random")
    config.selection.keep_fractions = (0.1, 0.5, 0.9)
    config.export.forms = ("jsonl",)
    config.lora.optimiser = "adamw"
    config.lora.learning_rate = 1e-3
    config.lora.warmup_steps = 5
    config.lora.dtype = "float32"
    config.lora.rematerialise = False
    config.lora.epochs = 1
    config.evaluation.mmlu = "demo:mmlu"
    config.evaluation.limit = 10
    return config
