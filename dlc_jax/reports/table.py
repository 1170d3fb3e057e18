"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tabulate import tabulate

from dlc_jax.expect import markdown_text, visible

_MAX_CLASSES = 50
_MAX_ID = 36
_AS_IT_IS: dict[str, Any] = {"disable_numparse": True, "preserve_whitespace": True}


def class_table(
    class_names: tuple[str, ...],
    labels: Int[np.ndarray, " n"],
    scores: np.ndarray,
    ids: np.ndarray,
    kept: Int[np.ndarray, " kept"] | None,
) -> str:
    """Returns one line per class: samples, kept, easiest and hardest id.

    Args:
      class_names: [c] names.
      labels: [n] class ids.
      scores: [n], higher is harder.
      ids: [n] sample ids.
      kept: Kept positions of the selection shown, or None before there is one.
    """
    num_kept = ["-"] * (len(class_names) + 1)
    if kept is not None:
        counts = np.bincount(labels[kept], minlength=len(class_names))
        num_kept = [str(count) for count in (*counts, len(kept))]
    rows = [("class", "samples", "kept", "easiest", "hardest")]
    for label, name in enumerate(class_names[:_MAX_CLASSES]):
        members = np.flatnonzero(labels == label)
        easiest, hardest = members[scores[members].argmin()], members[scores[members].argmax()]
        ends = (_shown(ids[easiest]), _shown(ids[hardest]))
        rows.append((_shown(name), str(len(members)), num_kept[label], *ends))
    rows.append(("all", str(len(labels)), num_kept[-1], "", ""))
    alignment = ("left", "right", "right", "left", "left")
    lines = tabulate(rows, tablefmt="plain", colalign=alignment, **_AS_IT_IS).split("\n")
    if len(class_names) > _MAX_CLASSES:
        lines.insert(-1, f"... {len(class_names) - _MAX_CLASSES} more classes")
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that shows every cell as it is."""
    shown = [[markdown_text(cell) for cell in row] for row in rows]
    # tabulate widens headers by two; given as a row, the header comes after the rule
    line, names, *others = tabulate([header, *shown], tablefmt="github", **_AS_IT_IS).split("\n")
    return "\n".join([names, line, *others])


def _shown(name: Any) -> str:
    text = visible(str(name))
    return text if len(text) <= _MAX_ID else "..." + text[3 - _MAX_ID :]
