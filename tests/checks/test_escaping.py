"""Text from data on the terminal, in Markdown and in CSV files."""

import csv
import io

import pytest
from conftest import encoded, random_images
from markdown_it import MarkdownIt

import dlc_jax as dlc
from dlc_jax.cli import check, main
from dlc_jax.expect import csv_cell, csv_text, markdown_text, show, visible
from dlc_jax.preprocess.inspection import inspect

HOSTILE = "a\x1b[2J\x9b31m\r\n\t\b\u202eb\u2028c"


def test_characters_that_do_not_show_are_escaped():
    assert visible(HOSTILE) == r"a\x1b[2J\x9b31m\r\n\t\x08\u202eb\u2028c"
    assert visible("\ud800\x00\u200b\ufeff") == r"\ud800\x00\u200b\ufeff"
    plain = "ö 漢字 עברית नमस्ते نمی‌دانم 👩‍🚀 C:\\n"
    assert visible(plain) == plain
    assert visible(visible(HOSTILE)) == visible(HOSTILE)


def test_only_line_breaks_reach_the_terminal(capsys):
    show("one\x1b[0m\rtwo\nthree")
    show("four\x9b", to_stderr=True)
    assert capsys.readouterr() == ("one\\x1b[0m\\rtwo\nthree\n", "four\\x9b\n")


def test_lines_of_the_commands_are_visible(capsys):
    main._say(f"error: {HOSTILE}")
    assert capsys.readouterr().err == f"error: {visible(HOSTILE)}\n"
    images = [encoded(random_images(1)[0]), b"none"]
    check._print(inspect(dlc.array_dataset(images, ["x", "y"], ids=["a", HOSTILE])))
    assert visible(HOSTILE) in capsys.readouterr().out


def test_messages_of_errors_are_one_visible_line():
    assert str(dlc.InputError(f"sample {HOSTILE} is bad.")) == f"sample {visible(HOSTILE)} is bad."


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script> <img src=x> &lt;b&gt; &copy;",
        "[click](http://evil.example) ![x](//evil.example/x.png) [a][b] <http://evil.example>",
        "`code` ``x`` **bold** _em_ __init__ ~~no~~ a|b \\* k_center_greedy",
        "# heading",
        "- item",
        "1. item",
        "   * item",
        "+ item",
        "===",
        "---",
        "> quoted",
        "```python",
        "~~~",
        "[x]: http://evil.example",
        "<div>",
        "https://evil.example www.evil.example",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    """Rendered, it is one paragraph of text, also where plain addresses become links."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = renderer.parse(f"{markdown_text(text, begins_line=True)}\n")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {token.type for token in tokens[1].children} <= {"text", "text_special"}
    assert "".join(token.content for token in tokens[1].children) == text.strip()
    assert "<" not in markdown_text(text)


def test_markdown_breaks_addresses_that_become_links_by_themselves():
    shown = markdown_text("see https://evil.example, HTTP://x or www.evil.example")
    assert shown == r"see https\://evil.example, HTTP\://x or www\.evil.example"


@pytest.mark.parametrize(
    "text", ["=1+1", "+x", "-x", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "'", "'plain", "x=1"]
)
def test_cells_are_no_formulas_and_come_back(text):
    cell = csv_cell(text)
    assert cell[0] not in "=+-@\t\r"
    file = io.StringIO()
    csv.writer(file).writerow([cell])
    file.seek(0)
    assert [csv_text(value) for value in next(csv.reader(file))] == [text]


@pytest.mark.parametrize("value", [-3, -1.5, "-3", "+1.5e-3", "", None, "plain", "don't"])
def test_numbers_and_plain_text_stay(value):
    assert csv_cell(value) is value
