"""Pictures: accuracy against the keep fraction, the easiest and hardest images of each class."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dlc_jax.expect import escaped, visible
from dlc_jax.preprocess.decode import decode
from dlc_jax.reports.results import Row
from dlc_jax.types import Dataset, Tried, Tuning


def lettering(text: str) -> tuple[str, Path]:
    """Returns the text as it can be drawn on one line, and the font to draw it with.

    DejaVu Sans, or the first font of the system that has every character; where there is none,
    characters that DejaVu Sans lacks are replaced by their escaped code points.
    """
    text = visible(text)
    basic = _basic_font()
    missing = set(text) - _characters(basic)
    if not missing:
        return text, basic
    from matplotlib import font_manager

    for font in map(Path, sorted(font_manager.findSystemFonts())):
        if set(text) <= _characters(font):
            return text, font
    return "".join(escaped(char) if char in missing else char for char in text), basic


def _basic_font() -> Path:
    import matplotlib  # ships it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _characters(font: Path) -> frozenset[str]:
    """Returns the characters that a font of outlines has; none if it is not one."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(font))
    except (OSError, RuntimeError, ValueError):  # bitmaps, and files of other formats
        return frozenset()
    return frozenset(map(chr, face.get_charmap())) if face.scalable else frozenset()


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


_MAX_GAMMAS = 5  # lines of FlexRand in the figure


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


_MAX_CLASSES = 20
_SIDE, _GAP, _MARGIN, _HEADER, _NAME = 64, 4, 12, 30, 130
_FONT_SIZE, _LONGEST = 12, 100
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def easiest_hardest(
    dataset: Dataset, positions: np.ndarray, scores: np.ndarray, num_each: int = 5
) -> Image.Image:
    """Draws a row per class: its easiest images from the left, its hardest to the right.

    Args:
      dataset: Where the images come from.
      positions: [n] positions in the data set of the scored samples.
      scores: [n], higher is harder.
      num_each: Images on either side; fewer where the class is small. 20 classes at most.
    """
    shown = range(min(dataset.num_classes, _MAX_CLASSES))
    half = num_each * (_SIDE + _GAP)
    left = _MARGIN + _NAME
    right = left + half + 2 * _MARGIN
    height = _HEADER + len(shown) * (_SIDE + _GAP) + _MARGIN
    sheet = Image.new("RGB", (right + half + _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (left, 9), "easiest (lowest DLC first)", half)
    _write(draw, (right, 9), "hardest (highest DLC last)", half)
    labels = dataset.labels[positions]
    for row, label in enumerate(shown):
        top = _HEADER + row * (_SIDE + _GAP)
        _write(draw, (_MARGIN, top + _SIDE // 2 - 8), dataset.class_names[label], _NAME - _GAP)
        members = np.flatnonzero(labels == label)
        order = members[np.argsort(scores[members], kind="stable")]
        num_left = min(num_each, -(-len(order) // 2))
        num_right = min(num_each, len(order) - num_left)
        for start, some in ((left, order[:num_left]), (right, order[len(order) - num_right :])):
            for column, position in enumerate(positions[some].tolist()):
                place = (start + column * (_SIDE + _GAP), top)
                sheet.paste(_square(dataset, position), place)
    return sheet


_MAX_SUSPECTS, _COLUMNS = 20, 4


def mislabelled(
    dataset: Dataset, positions: np.ndarray, suggested: np.ndarray, num: int = _MAX_SUSPECTS
) -> Image.Image:
    """Draws images with the class that they have and, below it, the one that they look like.

    Args:
      dataset: Where the images come from.
      positions: [s] positions in the data set, the most suspect first.
      suggested: [s] class ids.
      num: Most images that are drawn, four in a row.
    """
    shown = list(zip(positions.tolist(), suggested.tolist(), strict=True))[:num]
    width, height = _NAME + _MARGIN, _SIDE + _HEADER + 2 * _GAP
    num_rows = max(-(-len(shown) // _COLUMNS), 1)
    size = (_MARGIN + _COLUMNS * width, 2 * _MARGIN + num_rows * height)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (position, label) in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        left, top = _MARGIN + column * width, _MARGIN + row * height
        sheet.paste(_square(dataset, position), (left, top))
        below, names = top + _SIDE, dataset.class_names
        _write(draw, (left, below), names[dataset.labels[position]], _NAME)
        _write(draw, (left, below + _HEADER // 2), f"→ {names[label]}", _NAME)
    return sheet


def _square(dataset: Dataset, position: int) -> Image.Image:
    sample = dataset[position]
    image = decode(sample.image, sample.id, dataset.deep_images)
    return ImageOps.fit(image, (_SIDE, _SIDE))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Draws the text, cut where it would be wider than this."""
    shown, file = lettering(text[:_LONGEST])
    font = ImageFont.truetype(file, _FONT_SIZE)
    cut = shown
    while len(cut) > 1 and font.getlength(cut) > width:
        shown = shown[:-1]
        cut = f"{shown}…"
    draw.text(place, cut, _INK, font)
