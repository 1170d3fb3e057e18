"""Classes, tuning and instructions as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tabulate import tabulate

from dlc_jax.datasets.instructions import Instructions
from dlc_jax.expect import markdown_text, visible
from dlc_jax.tuning import KeepCurve
from dlc_jax.types import Tuning

_MAX_CLASSES = 50
_MAX_ID = 36
_NUM_EACH = 5  # instructions of each end
_MAX_TEXT = 600  # characters shown of a prompt or response
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


def tuning_table(tuning: Tuning, curve: KeepCurve) -> str:
    """Returns Markdown: a row per keep fraction, the reasons, and how much may be dropped.

    Args:
      tuning: What was tried.
      curve: Keep curve of the method `auto`.
    """
    gaps = ("gap to random", "gap to full")
    header = ("keep", "random, %", "auto", "auto, %", *gaps, "FlexRand split")
    rows = []
    splits = tuning.splits or (None,) * len(tuning.methods)
    for choice, at_split in zip(tuning.methods, splits, strict=True):
        random = tuning.row(choice.keep_fraction, "random", None)
        best = tuning.row(*choice[:3])
        to_random = "" if best is random else str(best.to_random)
        split = "" if at_split is None else f"{at_split.split:g}"
        of_auto = (best.label, f"{best.accuracy:.1f}", to_random, str(best.to_full))
        rows.append((f"{choice.keep_fraction:g}", f"{random.accuracy:.1f}", *of_auto, split))
    what = "linear heads" if tuning.trained == "linear_probe" else "fine-tuning"
    said = (
        f"Accuracy of {what} on {tuning.num_repeats} held-out fifths of the training data; of "
        f"the full set {tuning.full_accuracy:.1f} %. Gaps in points with 95 % intervals; to be "
        "beyond noise, one has to be above 0 also when corrected for all that are compared."
    )
    reasons = [f"- keep {choice.keep_fraction:g}: {choice.why}." for choice in tuning.methods]
    reasons += [
        f"- keep {choice.keep_fraction:g}, FlexRand's split: {choice.why}."
        for choice in tuning.splits
    ]
    return "\n\n".join([said, markdown(header, rows), "\n".join(reasons), _how_much(curve)])


def _how_much(curve: KeepCurve) -> str:
    lost = f"{curve.tolerance:g} point{'s' * (curve.tolerance != 1)}"
    if curve.smallest == 1:
        return (
            "At the largest keep fraction that was tried the full set is better by more than "
            f"{lost} on average."
        )
    surely = (
        f"{curve.surely:g} with 95 % certainty at each"
        if curve.surely < 1
        else "no keep fraction does so with 95 % certainty"
    )
    return (
        f"Smallest keep fraction from which on the full set is better by at most {lost}: "
        f"{curve.smallest:g} on average; {surely}."
    )


def easiest_hardest_text(data: Instructions, scores: Float[np.ndarray, " n"]) -> str:
    """Returns Markdown with the samples of the lowest and of the highest scores, as plain text."""
    order = np.argsort(scores, kind="stable")
    parts = []
    for title, positions in (
        ("Easiest", order[:_NUM_EACH]),
        ("Hardest", order[::-1][:_NUM_EACH]),
    ):
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
    if len(shown) > _MAX_TEXT:
        shown = f"{shown[:_MAX_TEXT]} ..."
    lines = (line.expandtabs(4) for line in shown.splitlines())
    return "\n".join(f"> {markdown_text(line, begins_line=True)}" for line in lines)
