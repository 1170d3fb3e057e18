import numpy as np
import pytest
from conftest import random_images
from matplotlib import font_manager
from PIL import Image

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.reports import class_table, easiest_hardest, easiest_hardest_text, mislabelled
from dlc_jax.reports import figures as lettering_module
from dlc_jax.reports.table import markdown


def test_table_names_extremes_and_counts_kept():
    labels = np.array([0, 0, 1, 1, 1])
    scores = np.array([3.0, 1.0, 5.0, 4.0, 6.0])
    ids = np.array(list("abcde"))
    table = class_table(("ant", "bee"), labels, scores, ids, np.array([1, 2, 3]))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["ant", "2", "1", "b", "a"],
        ["bee", "3", "2", "d", "e"],
        ["all", "5", "3"],
    ]


def test_tables_are_these_to_the_byte_and_wide_characters_take_two_columns():
    table = class_table(("ant", "犬"), np.array([0, 1]), np.zeros(2), np.array(["1e3", " b"]), None)
    assert table.split("\n") == [
        "class  samples  kept  easiest  hardest",
        "ant          1     -  1e3      1e3",
        "犬           1     -   b        b",
        "all          2     -",
    ]
    assert markdown(["keep", "", "a|b"], [["0.10", "犬", "x"], ["1", "", "|"]]).split("\n") == [
        "| keep |    | a|b |",
        "|------|----|-----|",
        "| 0.10 | 犬 | x   |",
        "| 1    |    | \\|  |",
    ]


def test_table_stays_a_table_with_odd_names_and_many_classes():
    names = ("line\nbreak", "x" * 300, *(f"class {j}" for j in range(2, 60)))
    labels = np.arange(60)
    lines = class_table(names, labels, np.zeros(60), labels.astype(str), None).splitlines()
    assert len(lines) == 1 + 50 + 2
    assert lines[1].startswith("line\\nbreak")
    assert "10 more classes" in lines[-2]
    assert max(map(len, lines)) < 140


def test_picture_shows_the_extremes_of_each_class():
    pixels = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(12)])
    dataset = dlc.array_dataset(pixels, [0, 1] * 6)
    scores = np.arange(12.0)
    sheet = np.asarray(easiest_hardest(dataset, np.arange(12), scores, num_each=2))
    shown = {
        int(value) for value in np.unique(sheet[30:]) if np.count_nonzero(sheet == value) > 9000
    }
    # class 0 has 0, 20, ..., 100 and class 1 has 10, 30, ..., 110: two from either end
    assert {0, 20, 80, 100, 10, 30, 90, 110} <= shown
    assert not {40, 60, 50, 70} & shown


def test_picture_of_many_small_classes_is_cut():
    dataset = dlc.array_dataset(random_images(30, 8), np.arange(30))
    sheet = easiest_hardest(dataset, np.arange(30), np.zeros(30))
    assert sheet.height < 20 * 70 + 60


def test_picture_shows_the_most_suspect_images_in_their_order():
    pixels = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(25)])
    dataset = dlc.array_dataset(pixels, np.arange(25) % 2, class_names=["left", "right"])
    order = np.random.default_rng(0).permutation(25)
    sheet = np.asarray(mislabelled(dataset, order, 1 - dataset.labels[order]))
    starts = [(12 + 102 * (i // 4), 12 + 142 * (i % 4)) for i in range(20)]
    shown = [int(sheet[top + 30, left + 30, 0]) for top, left in starts]
    assert shown == [10 * i for i in order[:20]]
    names = [sheet[top + 64 : top + 100, left : left + 130] for top, left in starts]
    lefts = [name for name, i in zip(names, order[:20], strict=True) if i % 2 == 0]
    rights = [name for name, i in zip(names, order[:20], strict=True) if i % 2 == 1]
    assert all((name == lefts[0]).all() for name in lefts)
    assert all((name == rights[0]).all() for name in rights)
    assert (lefts[0] != rights[0]).any()
    assert mislabelled(dataset, order[:0], order[:0]).size == Image.fromarray(sheet[:126]).size


def test_table_shows_what_does_not_show():
    ids = np.array(["a\x1b[2J", "b\rc"])
    table = class_table(("x\x9b",), np.array([0, 0]), np.array([0.0, 1.0]), ids, None)
    assert table.splitlines()[1].split() == [r"x\x9b", "2", "-", r"a\x1b[2J", r"b\rc"]


def test_instructions_are_shown_as_plain_text():
    rows = [
        {"id": "<b>\n# x", "prompt": "<script>\n![i](//e)", "response": "# h\x1b[2J\r\n> | `c`"},
        {"id": "two", "prompt": "p", "response": "r"},
    ]
    data = instructions(rows)
    shown = easiest_hardest_text(data, np.array([0.0, 1.0]))
    assert "## &lt;b&gt;\\\\n# x: DLC 0.000\n" in shown
    assert "> &lt;script&gt;\n> \\!\\[i\\](//e)\n" in shown
    assert "> \\# h\\\\x1b\\[2J\n> &gt; \\| \\`c\\`\n" in shown
    assert not set("\x1b\r<") & set(shown)


def ink(text: str) -> np.ndarray:
    """Where the name of the first class is drawn in the picture."""
    dataset = dlc.array_dataset(random_images(2, 8), [0, 1], class_names=[text, "z"])
    sheet = np.asarray(easiest_hardest(dataset, np.arange(2), np.zeros(2)))
    return sheet[34:94, 12:140].min(axis=-1) < 128


@pytest.mark.parametrize("pair", [("ö", "ô"), ("Ж", "Я"), ("ع", "م")])
def test_names_of_other_scripts_are_drawn_and_differ(pair):
    """A box for both would be the same."""
    first, second = map(ink, pair)
    assert first.any()
    assert not np.array_equal(first, second)


def test_characters_that_no_font_has_are_drawn_as_code_points(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    text, font = lettering_module.lettering("x漢\x1b")
    assert (text, font.name) == (r"x\u6f22\x1b", "DejaVuSans.ttf")
    np.testing.assert_array_equal(ink("漢"), ink(r"\u6f22"))


def test_a_font_of_the_system_that_has_all_characters_is_taken(monkeypatch):
    full = lettering_module._basic_font()
    poor = full.with_name("cmr10.ttf")
    monkeypatch.setattr(lettering_module, "_basic_font", lambda: poor)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(poor), str(full)])
    assert lettering_module.lettering("Ж") == ("Ж", full)
    assert lettering_module.lettering("A") == ("A", poor)


def test_a_font_that_is_none_has_no_characters(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    assert lettering_module._characters(tmp_path / "x.ttf") == frozenset()
