"""The easiest and hardest images of each class, side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dlc_jax.preprocess import decode
from dlc_jax.reports.lettering import lettering
from dlc_jax.types import Dataset

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
                sample = dataset[position]
                image = decode(sample.image, sample.id, dataset.deep_images)
                place = (start + column * (_SIDE + _GAP), top)
                sheet.paste(ImageOps.fit(image, (_SIDE, _SIDE)), place)
    return sheet


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Draws the text, cut where it would be wider than this."""
    shown, file = lettering(text[:_LONGEST])
    font = ImageFont.truetype(file, _FONT_SIZE)
    cut = shown
    while len(cut) > 1 and font.getlength(cut) > width:
        shown = shown[:-1]
        cut = f"{shown}…"
    draw.text(place, cut, _INK, font)
