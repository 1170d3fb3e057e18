import numpy as np
from conftest import random_images

import dlc_jax as dlc
from dlc_jax.reports import class_table, easiest_hardest


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


def test_table_stays_a_table_with_odd_names_and_many_classes():
    names = ("line\nbreak", "x" * 300, *(f"class {j}" for j in range(2, 60)))
    labels = np.arange(60)
    lines = class_table(names, labels, np.zeros(60), labels.astype(str), None).splitlines()
    assert len(lines) == 1 + 50 + 2
    assert lines[1].startswith("line break")
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
