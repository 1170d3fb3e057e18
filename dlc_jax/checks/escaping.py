"""Text from data, made safe for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, bidirectional overrides, ...
_JOINERS = "\u200c\u200d"  # of Persian, of Indian scripts and of emoji
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def visible(text: str) -> str:
    r"""Returns the text on one line, with invisible characters escaped: `\n`, `\x1b`, `\u202e`.

    Everything else, backslashes too, stays as it is, so that twice is the same as once.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(escaped(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN and char not in _JOINERS


def escaped(char: str) -> str:
    r"""Returns a character by its code point, as in `\x1b` or `\u202e`."""
    return char.encode("unicode_escape").decode()


def show(text: str, *, to_stderr: bool = False) -> None:
    """Prints the text; only its line breaks have an effect on the terminal."""
    file = sys.stderr if to_stderr else sys.stdout
    print("\n".join(map(visible, text.split("\n"))), file=file, flush=True)


def markdown_text(text: str, *, begins_line: bool = False) -> str:
    """Returns one line of Markdown that shows the text as it is: no HTML, links, images, marks.

    Args:
      text: Any.
      begins_line: Whether it begins a line, where it could be a heading, a list item or a rule.
    """
    shown = visible(text)
    shown = re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|!(?=\[)", r"\\\g<0>", shown)
    # these become links without any marks
    shown = re.sub(r"(?i)(?<=\w)(?=:/)|(?<=www)(?=\.)", r"\\", shown)
    if begins_line:
        shown = re.sub(r"^\s*([0-9]+(?=[.)])|(?=[#+=-]))", r"\g<0>\\", shown)
    return html.escape(shown, quote=False)


def csv_cell(value: Any) -> Any:
    """Returns the value of a cell; text that a spreadsheet would compute gets an apostrophe."""
    is_formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def csv_text(cell: str) -> str:
    """Returns the text that `csv_cell` was given."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
