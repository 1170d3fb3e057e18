"""MMLU: the share of questions that a language model answers rightly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation.likelihoods import Pair, continuation_log_likelihoods
from dlc_jax.evaluation.mmlu_questions import LETTERS, SUBJECTS, Mmlu
from dlc_jax.evaluation.settings import EvaluationConfig
from dlc_jax.preprocess.tokens import TOKENS_PER_BATCH, tokenising


@dataclasses.dataclass(frozen=True)
class MmluResult:
    """Shares of right answers.

    Attributes:
      accuracy: Over all questions, in percent; guessing gives 25.
      by_group: In percent, over all questions of a group that has any.
      by_subject: In percent.
      num_questions: Number of questions that were asked.
      num_truncated: Questions whose prompt had to be cut at its beginning.
    """

    accuracy: float
    by_group: dict[str, float]
    by_subject: dict[str, float]
    num_questions: int
    num_truncated: int


def evaluate_mmlu(
    model: LanguageModel,
    mmlu: Mmlu,
    *,
    num_shots: int = EvaluationConfig.num_shots,
    limit: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> MmluResult:
    """Measures how many questions the model answers rightly, as lm_eval's task `mmlu` does.

    The answer is the likeliest of " A" to " D" after the prompt, the first of equally likely ones.
    Prompts longer than the model's limit lose their beginning.

    Args:
      model: From `load_language_model`.
      mmlu: From `load_mmlu`.
      num_shots: Solved questions in the prompt, the first ones of the subject.
      limit: Only so many questions of each subject, the first ones.
      tokens_per_batch, progress: As for `continuation_log_likelihoods`.
    Raises:
      ValueError: a subject with fewer solved questions than `num_shots`; by question, tokens that
        the model does not have.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> result = dlc.evaluate_mmlu(model, dlc.load_mmlu("demo:mmlu"), num_shots=0, limit=1)
      >>> result.num_questions, result.accuracy
      (8, 12.5)
    """
    EvaluationConfig(num_shots=num_shots, limit=limit).check(where="")
    mmlu.check_shots(num_shots)
    asked = [(s, question) for s in mmlu.subjects for question in s.questions[:limit]]
    prompts = [subject.prompt(question, num_shots) for subject, question in asked]
    pairs = _pairs(prompts, model.tokenizer)
    for number, pair in enumerate(pairs):
        subject, question = asked[number // len(LETTERS)]
        place = f"{mmlu.name}: {subject.name}, {question.question.strip()[:60]!r}"
        model.check_tokens((place, ids) for ids in pair)
    found = continuation_log_likelihoods(
        model,
        pairs,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    given = found.sums.reshape(-1, len(LETTERS)).argmax(axis=1)
    is_right = given == np.array([question.answer for _, question in asked])
    subjects = np.array([subject.name for subject, _ in asked])
    groups = np.array([SUBJECTS[name] for name in subjects])
    return MmluResult(
        accuracy=100 * float(is_right.mean()),
        by_group=_percent(is_right, groups),
        by_subject=_percent(is_right, subjects),
        num_questions=len(asked),
        num_truncated=int((found.num_cut.reshape(-1, len(LETTERS)) > 0).any(axis=1).sum()),
    )


def _pairs(prompts: list[str], tokenizer: Any) -> list[Pair]:
    """Returns ids of each prompt with each letter: what the letter adds to the prompt's own ids."""
    pairs = []
    for prompt in prompts:
        texts = [prompt, *(f"{prompt} {letter}" for letter in LETTERS)]
        with tokenising(f"{prompt[-60:]!r}: the tokenizer cannot read it"):
            context, *wholes = tokenizer(texts, verbose=False)["input_ids"]
        pairs += [(context, whole[len(context) :]) for whole in wholes]
    return pairs


def _percent(is_right: np.ndarray, names: np.ndarray) -> dict[str, float]:
    return {str(name): 100 * float(is_right[names == name].mean()) for name in np.unique(names)}
