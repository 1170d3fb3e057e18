"""What a language model knows: likelihoods of continuations, MMLU, and a class for lm_eval."""

from dlc_jax.evaluation.likelihoods import Likelihoods, continuation_log_likelihoods
from dlc_jax.evaluation.mmlu import MmluResult, evaluate_mmlu
from dlc_jax.evaluation.mmlu_questions import Mmlu, load_mmlu

__all__ = [
    "Likelihoods",
    "Mmlu",
    "MmluResult",
    "continuation_log_likelihoods",
    "evaluate_mmlu",
    "load_mmlu",
]
