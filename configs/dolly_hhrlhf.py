"""Prunes Dolly+HH-RLHF with a 7 to 9 billion parameter model, in the paper's settings.

python -m dlc_jax.main --config=configs/dolly_hhrlhf.py:mistral-7b

Models: mistral-7b (mistralai/Mistral-7B-v0.3, where none is named), llama3-8b
(meta-llama/Meta-Llama-3-8B), gemma2-9b (google/gemma-2-9b), as in
--config=configs/dolly_hhrlhf.py:llama3-8b. Each has a work directory of its own, such as
runs/dolly_hhrlhf-llama3-8b.
Needs: a GPU that holds the model in bfloat16 (15 to 19 GB) and a masked copy of it; network once,
for data and model. Llama 3 and Gemma 2 are given to those who accept their terms on the hub and log
in with `hf auth login`. Without network: --config.dataset.train=hf:<folder>/train and
--config.encoder.weights=<folder>.
Data: mosaicml/dolly_hhrlhf on the Hugging Face hub, databricks-dolly-15k and a part of Anthropic's
HH-RLHF; prompt and response, the prompt in Alpaca's template already.
Licence: data CC BY-SA 3.0 (Dolly) and MIT (HH-RLHF); models Apache 2.0 (Mistral), Llama 3 Community
License, Gemma Terms of Use.
Rows: about 59,000, as one class.
Selects: FlexRand and random at the paper's keep fractions 0.1 to 0.9, with split 0.5 and seed 1.
Fine-tunes, where asked: --config.stages=finetune,evaluate,report
--config.evaluation.mmlu=mmlu:<folder> trains LoRA adapters by the paper's schedule (SGD, 7e-6, 3
epochs of batches of 32) on all 19 sets, and asks 5-shot MMLU. --config.stages=plan tells first
whether the memory suffices.
As released: --config=configs/dolly_hhrlhf.py:llama3-8b,official takes the settings of the
authors' released code: mode official (its prompts and masks, keep fraction 0.5, splits 0.25 and
0.75), and LoRA of rank 16, AdamW at 5e-4, one epoch of batches of 4, loss on the whole text of at
most 1,024 tokens. Not reproduced: weights in 8 bits, gradients clipped to norm 1, and torch's draws
of order and dropout.
Expected: kept rows with all their fields in exports/ of the work directory, and the easiest and
hardest of them in scores/easiest_hardest.md. Not run yet: no numbers.
"""

from ml_collections import ConfigDict

from dlc_jax import presets


def get_config(choice: str = presets.DEFAULT_MODEL) -> ConfigDict:
    config = presets.paper_instructions(choice)
    config.dataset.train = "hf:mosaicml/dolly_hhrlhf/train"
    return config
