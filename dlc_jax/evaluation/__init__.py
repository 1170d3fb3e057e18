"""What a language model knows: likelihoods of continuations, MMLU, and a class for lm_eval."""

from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods
from dlc_jax.evaluation.mmlu import evaluate_mmlu
from dlc_jax.evaluation.mmlu_questions import Mmlu, load_mmlu

__all__ = [
    "Mmlu",
    "continuation_log_likelihoods",
    "evaluate_mmlu",
    "load_mmlu",
]
