"""The paper's figure: gap to random against keep fraction, a line and a band per method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlc_jax.reports.lettering import lettering, literal
from dlc_jax.reports.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@literal
def gap_to_random(rows: Sequence[Row], title: str) -> Figure:
    """Draws the mean gap of every method over seeds, in percentage points, with its 95 % interval.

    Args:
      rows: From `summarise`; those without a gap are left out.
      title: What the figure is of.
    Source: Jiang et al. 2025, figures of accuracy gaps to random pruning.
    """
    figure, axes = keep_fraction_axes(4.0, "test accuracy minus random, points")
    axes.axhline(0, color="black", linewidth=1, linestyle="--", label="random")
    for label in dict.fromkeys(row.label for row in rows if row.gap is not None):
        mine = sorted(
            (row.keep_fraction, row.gap.mean, row.gap.half_width)
            for row in rows
            if row.label == label and row.gap is not None
        )
        keep, mean, half = np.array(mine).T
        (line,) = axes.plot(keep, mean, marker="o", markersize=4, label=lettering(label)[0])
        axes.fill_between(keep, mean - half, mean + half, color=line.get_color(), alpha=0.15)
    shown, font = lettering(title)
    axes.set_title(shown, font=font, fontsize="medium")
    legend_beside(axes)
    return figure


def keep_fraction_axes(height: float, values: str) -> tuple[Figure, Axes]:
    """Returns a new figure and its axes, of these values against the keep fraction in percent."""
    from matplotlib.figure import Figure  # half a second, which only reports need

    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("keep fraction")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_ylabel(values)
    axes.grid(alpha=0.3)
    return figure, axes


def legend_beside(axes: Axes) -> None:
    """Adds a legend to the right of the axes, where it covers no line."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
