"""Pieces of the programs of evidence: DLC of a split, shifts, tables, what `auto` is tested on."""

import numpy as np
import pytest

import dlc_jax as dlc
from benchmarks import auto_power, evidence
from benchmarks.evidence import KEEP_FRACTIONS, Case, Split, gap_table, measured, shifts

SOURCE = "demo:caltech15/train"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Six images of each of the sample's classes, and what is measured of them."""
    data = dlc.load_dataset(SOURCE)
    data = data.subset(np.concatenate([np.flatnonzero(data.labels == j)[:6] for j in range(15)]))
    path = tmp_path_factory.mktemp("evidence") / "few"
    dlc.export(data, np.arange(len(data)), path, form="parquet", part="kept")
    case = Case((f"parquet:{path}",), ("resnet18", "demo:resnet18"), 32, 1 / 3)
    return dlc.load_dataset(f"parquet:{path}"), measured(case, "")


@pytest.mark.slow
def test_losses_of_a_split_are_those_of_scoring_its_training_part(few, sample_encoder):
    data, found = few
    split = Split.of(found, 1 / 3, 3)
    assert np.bincount(found.labels[split.train]).tolist() == [4] * 15
    assert np.bincount(found.labels[split.test]).tolist() == [2] * 15
    probes = dlc.probe(sample_encoder, data.subset(split.train), image_size=32, path=evidence._PATH)
    np.testing.assert_allclose(found.losses(split.train)[1:], probes.losses, atol=2e-5)
    right = 100 * (probes.nearest == probes.labels).mean(axis=1)
    np.testing.assert_allclose(found.right(split.train)[1:], right, atol=100 / 60 + 1e-6)


def test_shifts_are_zero_for_everything_and_equal_the_definition():
    rows = np.random.default_rng(0).normal(size=(30, 4))
    part = np.arange(0, 30, 3)
    squares = np.square(rows[:, None] - rows[None]).sum(axis=2)
    width = np.median(squares[np.triu_indices(30, 1)])
    kernel = np.exp(-squares / (2 * width))
    expected = kernel[part][:, part].mean() - 2 * kernel[part].mean() + kernel.mean()
    np.testing.assert_allclose(shifts(rows, [part, np.arange(30)]), [expected, 0], atol=1e-12)


def test_the_table_marks_what_is_beyond_chance():
    generator, num = np.random.default_rng(0), len(KEEP_FRACTIONS)
    random = generator.normal(70, 1, (12, num))
    better = random + generator.normal(10, 0.5, (12, num))
    alike = random + generator.normal(0, 1, (12, num))
    table, gaps = gap_table(np.concatenate([random, better, alike], axis=1), ["r", "b", "a"], 0.5)
    lines = table.splitlines()
    assert lines[3].count("\\*") == num + 2  # and both means
    assert "\\*" not in lines[4]
    assert gaps[0][0].mean == pytest.approx((better - random)[:, 0].mean())


def test_every_way_is_tried_at_every_keep_fraction():
    names = {way[0] for way in evidence.WAYS}
    assert {"random", "flexrand", "herding", "typical", "d2", "ram_apl"} <= names
    assert evidence.WAYS[0] == ("random", None)
    assert len(evidence.CELLS) == len(evidence.WAYS) * 9


@pytest.mark.parametrize(("gain", "share"), [(0.0, (0, 12)), (8.0, (50, 100))])
def test_auto_is_rarely_wrong_and_finds_what_is_better(gain, share):
    found = np.array([auto_power.choices(800, gain / 100, seed) for seed in range(25)])
    right = 100 * (found == 1 if gain else found > 0).mean(axis=0)
    assert share[0] <= right[2] <= share[1]
    if gain:
        assert right[0] <= right[1] <= right[2]
