"""What tuning found: a table of choices, and accuracy against the keep fraction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dlc_jax.reports.figures import keep_fraction_figure
from dlc_jax.reports.table import markdown
from dlc_jax.tuning import KeepCurve
from dlc_jax.types import Tried, Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_GAMMAS = 5  # lines of FlexRand in the figure


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
        "beyond noise, one has to be above 0 also when corrected for how many are compared."
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


def tuning_figure(tuning: Tuning) -> Figure:
    """Draws validation accuracy against the keep fraction, a line per way of choosing.

    Random pruning has the band of its 95 % interval to the full set, and rings mark what `auto`
    stands for; of FlexRand's splits a few are drawn.
    """
    import matplotlib  # half a second, which only reports need

    splits = sorted({row.split for row in tuning.tried if row.split is not None})
    places = np.linspace(0, len(splits) - 1, min(len(splits), _MAX_GAMMAS)).round().astype(int)
    shown = (None, *(splits[place] for place in places))
    lines: dict[str, list[Tried]] = {}
    for row in tuning.tried:
        if row.split in shown:
            lines.setdefault(row.label, []).append(row)
    with keep_fraction_figure(4.4, "accuracy on held-out training data") as (figure, axes):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        colours = matplotlib.colormaps["tab20"]  # ten, as is usual, would run out
        axes.set_prop_cycle(color=[colours(number) for number in range(20)])
        full = tuning.full_accuracy
        axes.axhline(full, color="black", linewidth=1, linestyle="--", label="full set")
        for label, rows in lines.items():
            numbers = [(row.keep_fraction, row.accuracy, row.to_full.half_width) for row in rows]
            keep, mean, half = np.array(numbers).T
            (line,) = axes.plot(keep, mean, marker="o", markersize=3, linewidth=1, label=label)
            if label == "random":
                colour = line.get_color()
                axes.fill_between(keep, mean - half, mean + half, color=colour, alpha=0.15)
        chosen = [tuning.row(*choice[:3]) for choice in tuning.methods]
        keep, mean = np.array([(row.keep_fraction, row.accuracy) for row in chosen]).T
        ring: dict[str, Any] = {"s": 80, "facecolors": "none", "edgecolors": "black", "zorder": 3}
        axes.scatter(keep, mean, label="auto", **ring)
    return figure
