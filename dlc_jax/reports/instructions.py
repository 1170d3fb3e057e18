"""The easiest and the hardest instructions, to be read."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dlc_jax.datasets.instructions import Instructions
from dlc_jax.expect import markdown_text

_NUM = 5  # of each end
_LONGEST = 600  # characters shown of a prompt or response


def easiest_hardest_text(data: Instructions, scores: Float[np.ndarray, " n"]) -> str:
    """Returns Markdown with the samples of the lowest and of the highest scores, as plain text."""
    order = np.argsort(scores, kind="stable")
    parts = []
    for title, positions in (("Easiest", order[:_NUM]), ("Hardest", order[::-1][:_NUM])):
        parts.append(f"# {title}\n")
        for position in positions:
            parts.append(
                f"## {markdown_text(str(data.ids[position]))}: DLC {scores[position]:.3f}\n\n"
                f"{_quoted(data.prompts[position])}\n\n**Response**\n\n"
                f"{_quoted(data.responses[position])}\n"
            )
    return "\n".join(parts)


def _quoted(text: str) -> str:
    shown = text.strip()
    if len(shown) > _LONGEST:
        shown = f"{shown[:_LONGEST]} ..."
    lines = (line.expandtabs(4) for line in shown.splitlines())
    return "\n".join(f"> {markdown_text(line, begins_line=True)}" for line in lines)
