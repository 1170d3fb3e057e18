"""What a language model knows: likelihoods of continuations, MMLU, and a class for lm_eval."""

from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods
from dlc_jax.evaluation.mmlu import Mmlu, evaluate_mmlu, load_mmlu
