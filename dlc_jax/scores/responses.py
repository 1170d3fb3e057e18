"""Hardness of an instruction's response from a language model that was not masked."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from dlc_jax import checks
from dlc_jax.types import ResponseLosses


def perplexity(of: ResponseLosses) -> Float32[np.ndarray, " n"]:
    """Returns exp of the mean loss per token of the response, given its prompt; 1 or more.

    Source: Marion et al. 2023, When less is more.
    """
    return np.exp(of.losses)


def length(of: ResponseLosses) -> Float32[np.ndarray, " n"]:
    """Returns the number of tokens of the response, the end of the sequence included."""
    return of.num_tokens.astype(np.float32)


def ifd(of: ResponseLosses, variant: str = "published") -> Float32[np.ndarray, " n"]:
    """Returns instruction-following difficulty: how little the prompt helps; about 1 if not at all.

    Args:
      of: Losses with the prompt and of the response alone.
      variant: `published`, the ratio of the mean loss given the prompt to that of the bare
        response; `superfiltering`, of perplexities. `cherry`, as the code of Cherry LLM: the ratio
        to the loss behind `### Response:`, and 0 where that is above 1. The code drops such
        samples; a 0 ranks below all other scores, so that `hardest` keeps one only if there are too
        few others.
    Raises:
      ValueError: a response whose loss alone is 0, so that there is no ratio; losses behind
        `### Response:` that were not measured.
    Sources: Li et al. 2024, From quantity to quality (Cherry LLM), arXiv 2308.12032; Li et al.
      2024, Superfiltering, arXiv 2402.00530.
    """
    if variant == "superfiltering":
        return np.exp(of.losses - of.alone)
    alone = of.after_prefix if variant == "cherry" else of.alone
    if alone is None:
        raise checks.InputError(
            "ifd: variant 'cherry' needs after_prefix, as dlc.measure_responses(model, data) gives "
            "it; got None."
        )
    if not (alone > 0).all():
        raise checks.InputError(
            f"ifd: {int((alone <= 0).sum())} responses have no loss without their prompt, such "
            f"as {of.ids[np.argmin(alone)]}; expected variant 'superfiltering' for them."
        )
    ratio = of.losses / alone
    return np.where(ratio > 1, np.float32(0), ratio) if variant == "cherry" else ratio
