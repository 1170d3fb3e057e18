"""Text in figures and pictures: any script where a font has it, and no formulas."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from dlc_jax.checks.escaping import escaped, visible


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
    for font in _system_fonts():
        if set(text) <= _characters(font):
            return text, font
    return "".join(escaped(char) if char in missing else char for char in text), basic


def _basic_font() -> Path:
    import matplotlib  # ships it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _system_fonts() -> Iterator[Path]:
    from matplotlib import font_manager

    yield from map(Path, sorted(font_manager.findSystemFonts()))


@functools.cache
def _characters(font: Path) -> frozenset[str]:
    """Returns the characters that a font of outlines has; none if it is not one."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(font))
    except (OSError, RuntimeError, ValueError):  # bitmaps, and files of other formats
        return frozenset()
    return frozenset(map(chr, face.get_charmap())) if face.scalable else frozenset()
