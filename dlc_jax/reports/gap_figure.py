"""The paper's figure: gap to random against keep fraction, a line and a band per method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlc_jax.reports.lettering import lettering
from dlc_jax.reports.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gap_to_random(rows: Sequence[Row], title: str) -> Figure:
    """Draws the mean gap of every method over seeds, in percentage points, with its 95 % interval.

    Args:
      rows: From `summarise`; those without a gap are left out.
      title: What the figure is of.
    Source: Jiang et al. 2025, figures of accuracy gaps to random pruning.
    """
    with keep_fraction_figure(4.0, "test accuracy minus random, points") as (figure, axes):
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
    return figure


@contextlib.contextmanager
def keep_fraction_figure(height: float, values: str) -> Iterator[tuple[Figure, Axes]]:
    """Makes a figure of these values against the keep fraction in percent, and its axes.

    Its text shows `$` as it is, which else begins a formula. At the end, a legend is added to the
    right of the axes, where it covers no line.
    """
    import matplotlib  # half a second, which only reports need
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure(figsize=(8.0, height), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel("keep fraction")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_ylabel(values)
        axes.grid(alpha=0.3)
        yield figure, axes
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
