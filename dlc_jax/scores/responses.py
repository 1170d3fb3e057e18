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
      variant: `published`, the ratio of mean losses; `superfiltering`, of perplexities.
    Raises:
      ValueError: a response whose loss alone is 0, so that there is no ratio.
    Sources: Li et al. 2024, From quantity to quality (Cherry LLM), arXiv 2308.12032; Li et al.
      2024, Superfiltering, arXiv 2402.00530.
    """
    if variant == "superfiltering":
        return np.exp(of.losses - of.alone)
    if not (of.alone > 0).all():
        raise checks.InputError(
            f"ifd: {int((of.alone <= 0).sum())} responses have no loss without their prompt, such "
            f"as {of.ids[np.argmin(of.alone)]}; expected variant 'superfiltering' for them."
        )
    return of.losses / of.alone
