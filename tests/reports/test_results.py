"""Tables and figures of a sweep, from rows written by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dlc_jax import expect
from dlc_jax.reports import (
    gap_to_random,
    read_results,
    results_table,
    summarise,
    tuning_figure,
)
from dlc_jax.reports.results import Mean, Result
from dlc_jax.tuning.gaps import crossed, holm
from dlc_jax.types import Choice, Gap, Tried, Tuning

HEADER = "method,keep_fraction,split,seed,num_kept,test_accuracy,seconds\n"


def results(method: str, keep: float, accuracies, split=None, seeds=(1, 2, 3)) -> list[Result]:
    return [
        Result(method, keep, split, seed, accuracy)
        for seed, accuracy in zip(seeds, accuracies, strict=True)
    ]


SWEEP = [
    *results("full", 1.0, [80.0, 82.0, 81.0]),
    *results("random", 0.5, [70.0, 74.0, 72.0]),
    *results("random", 0.1, [50.0, 40.0, 45.0]),
    *results("flexrand", 0.5, [73.0, 77.1, 75.0], split=0.25),
    *results("flexrand", 0.1, [50.5, 39.0, 45.0], split=0.25),
    *results("hardest", 0.5, [60.0, 63.9, 62.0]),
]


def row_of(label: str, keep: float):
    (row,) = [row for row in summarise(SWEEP) if (row.label, row.keep_fraction) == (label, keep)]
    return row


def test_gaps_are_paired_by_seed():
    """Random differs by two points between seeds; the gap to it does not, and so is significant."""
    row = row_of("flexrand (split 0.25)", 0.5)
    gaps = np.array([3.0, 3.1, 3.0])
    assert row.accuracy.mean == pytest.approx(75.0333, abs=1e-4)
    assert row.gap.mean == pytest.approx(gaps.mean())
    low, high = stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))
    assert row.gap.half_width == pytest.approx((high - low) / 2)
    assert row.gap.half_width < 0.2 < row.accuracy.half_width
    assert row.verdict == "better than random"


def test_words_say_when_pruning_did_not_help():
    assert row_of("hardest", 0.5).verdict == "not better than random: worse"
    assert row_of("flexrand (split 0.25)", 0.1).verdict == "not better than random"
    assert row_of("random", 0.5).verdict == ""
    assert row_of("full", 1.0).gap is None
    table = results_table(summarise(SWEEP))
    lines = table.splitlines()
    assert len({len(line) for line in lines[:-2]}) == 1
    assert lines[-1] == (
        "± is half of a 95 % interval over seeds; random and a method are compared run by run. "
        "Better or worse: with 95 % confidence for all 3 gaps together (Holm)."
    )
    assert lines[2].startswith("| 1 ")  # the reference first
    assert "| 81.00 ± 2.48" in lines[2]
    assert "| -10.03 ± " in next(line for line in lines if "hardest" in line)
    assert "| +3.03 ± 0.14" in next(line for line in lines if "| 0.5  | flexrand" in line)


def test_seeds_without_a_partner_do_not_count():
    rows = summarise(
        [
            *results("random", 0.5, [70.0, 71.0], seeds=(1, 2)),
            *results("easiest", 0.5, [75.0, 99.0], seeds=(1, 7)),
            *results("easiest", 0.3, [75.0, 99.0], seeds=(1, 7)),
        ]
    )
    assert rows[1].gap.mean == 5.0
    assert rows[1].gap.num_seeds == 1
    assert math.isnan(rows[1].gap.half_width)
    assert rows[1].verdict == "above random (one seed)"
    assert str(rows[1].gap) == "5.00"
    assert rows[2].gap is None
    assert rows[2].verdict == "random was not run with these seeds"
    worse = summarise(
        [*results("random", 0.5, [7.0], seeds=(1,)), *results("x", 0.5, [6.0], seeds=(1,))]
    )
    assert worse[1].verdict == "not better than random (one seed)"


def test_a_gap_over_fewer_pairs_than_seeds_says_over_how_many():
    rows = summarise(
        [
            *results("random", 0.5, [70.0, 71.0, 74.0]),
            *results("easiest", 0.5, [75.0, 77.0, 99.0, 98.0], seeds=(1, 2, 7, 8)),
            *results("hardest", 0.5, [75.0, 77.0], seeds=(1, 2)),
        ]
    )
    lines = results_table(rows).splitlines()
    assert "(2 of 4 seeds)" in next(line for line in lines if "easiest" in line)
    assert sum("seeds)" in line for line in lines) == 1


def with_samples(method, keep, right):
    """Results whose runs were right about these test samples, [seeds, samples]."""
    return [
        Result(method, keep, None, seed, 100 * own.mean(), right=own)
        for seed, own in enumerate(np.asarray(right, bool), start=1)
    ]


def test_test_samples_vary_as_well_as_seeds():
    """Three seeds agree that six points are gained, on 100 test samples that say so by chance."""
    base = np.repeat([True, False], [60, 40])
    runs = np.stack([np.roll(base, shift) for shift in (0, 1, 2)])
    better = runs.copy()
    better[:, 70:76] = True
    rows = summarise([*with_samples("random", 0.5, runs), *with_samples("x", 0.5, better)])
    found = crossed(100.0 * (better.astype(int) - runs.astype(int)))
    gap = rows[1].gap
    assert (gap.mean, gap.num_seeds, gap.num_samples) == (6.0, 3, 100)
    assert gap.half_width == pytest.approx(found.half_width)
    assert gap.p_value == pytest.approx(2 * found.p_value)
    assert rows[1].verdict == "better than random"
    lines = results_table(rows).splitlines()
    assert "over seeds and 100 test samples; random and a method" in lines[-1]
    assert "run by run and sample by sample." in lines[-1]
    # the same gaps by seed have no noise at all
    by_seed = [result._replace(right=None) for result in with_samples("random", 0.5, runs)]
    mixed = summarise([*by_seed, *with_samples("x", 0.5, better)])
    assert mixed[1].gap.half_width == 0
    assert "(over seeds alone where a run has no predictions.npz)" in results_table(mixed)


def test_one_run_each_is_never_better_however_many_test_samples():
    worse, better = np.zeros((1, 400), bool), np.arange(400)[None] < 200
    rows = summarise([*with_samples("random", 0.5, worse), *with_samples("x", 0.5, better)])
    assert rows[1].gap.half_width < 6
    assert rows[1].verdict == "above random (one seed)"


def test_what_is_far_worse_is_called_so():
    """The p-value of being better rounds to 1 there."""
    generator = np.random.default_rng(0)
    good, bad = (np.tile(generator.random(2000) < p, (3, 1)) for p in (0.8, 0.5))
    bad[0, :5] = ~bad[0, :5]  # seeds are not all the same
    rows = summarise([*with_samples("random", 0.5, good), *with_samples("x", 0.5, bad)])
    assert rows[1].gap.p_value < 1e-9
    assert rows[1].verdict == "not better than random: worse"


def test_gaps_of_one_seed_do_not_weaken_others():
    generator = np.random.default_rng(0)
    random, x = (generator.random((3, 500)) < p for p in (0.5, 0.62))
    sweep = [*with_samples("random", 0.5, random), *with_samples("x", 0.5, x)]
    alone = summarise(sweep)[1]
    others = [with_samples(f"y{k}", 0.5, generator.random((1, 500)) < 0.5)[0] for k in range(30)]
    beside = summarise([*sweep, *others])
    assert beside[1].p_value == alone.p_value
    said = results_table(beside).splitlines()[-1]
    assert "(over test samples alone of one seed)" in said
    assert said.endswith("with 95 % confidence for the one gap.")


def test_words_are_corrected_for_the_number_of_gaps():
    """A gap that is beyond noise alone, among 20, and one that is beyond it anyway."""
    generator = np.random.default_rng(0)

    hardness = generator.random(500)

    def runs(share):
        """Five runs that are right about much the same samples."""
        return hardness + 0.05 * generator.random((5, 500)) < share

    random, slightly, much = with_samples("random", 0.5, runs(0.5)), runs(0.518), runs(0.75)
    alone = summarise([*random, *with_samples("x", 0.5, slightly)])[1]
    assert 0.05 / 20 < alone.gap.p_value < 0.05
    assert alone.verdict == "better than random"
    others = [r for k in range(18) for r in with_samples(f"y{k}", 0.5, runs(0.5))]
    several = [*random, *with_samples("x", 0.5, slightly), *with_samples("z", 0.5, much), *others]
    rows = {row.label: row for row in summarise(several)}
    assert rows["x"].verdict == "not better than random"
    assert rows["z"].verdict == "better than random"
    expected = holm([row.gap.p_value for row in rows.values() if row.gap is not None])
    assert [row.p_value for row in rows.values() if row.gap is not None] == expected


@pytest.mark.parametrize("gain", [0.1, 5.0, -5.0])
def test_gaps_that_are_all_equal_are_not_better(gain):
    """Also where the percentages are rounded, as 70.1 - 70 and 40.1 - 40 are."""
    accuracies = np.array([70.0, 40.0, 1 / 3])
    rows = summarise([*results("random", 0.5, accuracies), *results("x", 0.5, accuracies + gain)])
    way = "above" if gain > 0 else "not better than"
    assert rows[1].verdict == f"{way} random (all gaps equal, no interval)"


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    interval = Mean.of(values)
    assert (interval.mean, interval.num_seeds) == (3.75, 4)
    assert interval.half_width == pytest.approx((high - low) / 2)


def test_the_figure_has_a_line_and_a_band_per_method():
    figure = gap_to_random(summarise(SWEEP), "sample")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"random", "flexrand (split 0.25)", "hardest"}
    keep, gap = lines["flexrand (split 0.25)"].get_data()
    assert keep.tolist() == [0.1, 0.5]
    assert gap[1] == pytest.approx(3.0333, abs=1e-4)
    assert len(axes.collections) == 2
    assert axes.get_title() == "sample"


def drawn(figure):
    """Draws a figure; returns the boxes of its axes and legend, and the tick labels in view."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    labels = {}
    for name, axis, (low, high) in (
        ("x", axes.xaxis, axes.get_xlim()),
        ("y", axes.yaxis, axes.get_ylim()),
    ):
        places = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        labels[name] = [text.get_text() for place, text in places if low <= place <= high]
    return axes.get_window_extent(), axes.get_legend().get_window_extent(), labels


def check_legend_is_beside(figure, axes_box, legend_box):
    assert legend_box.x0 >= axes_box.x1
    inside = figure.bbox
    assert legend_box.x1 <= inside.x1
    assert legend_box.y0 >= inside.y0
    assert axes_box.width > inside.width / 2


def test_ticks_are_in_percent_and_the_legend_covers_no_line():
    many = [
        Result(f"method {i}", keep, None, 1, 50.0 + i) for i in range(12) for keep in (0.1, 0.5)
    ]
    figure = gap_to_random(summarise([*SWEEP, *many]), "sample")
    axes_box, legend_box, labels = drawn(figure)
    assert labels["x"][0] == "10 %"
    assert labels["x"][-1] == "50 %"
    check_legend_is_beside(figure, axes_box, legend_box)


def test_the_figure_of_tuning_has_percents_and_a_legend_beside_it():
    gap = Gap(0.0, 1.0, 1.0)
    tried = tuple(
        Tried(keep, method, split, 60.0 + 30 * keep, gap, gap, None)
        for keep in (0.1, 0.5)
        for method, split in (("random", None), *(("flexrand", i / 20) for i in range(1, 20)))
    )
    choices = tuple(Choice(keep, "random", None, "why") for keep in (0.1, 0.5))
    tuning = Tuning(tried, choices, (), 90.0, "linear_probe", 5, 0, "", None, 1.0)
    figure = tuning_figure(tuning)
    axes_box, legend_box, labels = drawn(figure)
    assert "10 %" in labels["x"]
    assert labels["y"][-1] == "90 %"
    check_legend_is_beside(figure, axes_box, legend_box)


def test_results_are_read_back(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(HEADER + "full,1.0,,1,750,80.5,3.2\nflexrand,0.3,0.5,2,225,61.25,1.0\n")
    expected = [Result("full", 1.0, None, 1, 80.5), Result("flexrand", 0.3, 0.5, 2, 61.25)]
    assert list(map(repr, read_results(path))) == list(map(repr, expected))  # NaN is not NaN


def test_losses_of_instructions_are_shown(tmp_path):
    """Runs that were not asked yet are left out; of none that was, the stage to run is named."""
    path = tmp_path / "results.csv"
    header = HEADER.strip() + ",test_loss\n"
    lines = [
        "base,0.0,,0,0,25.0,0.0,",
        "full,1.0,,1,750,,3.2,4.5",
        "random,0.3,,1,225,30.0,1.0,4.75",
    ]
    path.write_text(header + "\n".join(lines) + "\n")
    results = read_results(path)
    assert [result.method for result in results] == ["base", "random"]
    table = results_table(summarise(results))
    assert "test loss" in table
    assert "4.7500" in table
    path.write_text(header + lines[1] + "\n")
    with pytest.raises(ValueError, match="no run has a test_accuracy; run the stage 'evaluate'"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not there; run the stage 'finetune' first"),
        (HEADER, "has no rows"),
        ("method,seed\nfull,1\n", "has no column keep_fraction, split, test_accuracy"),
        (HEADER + "full,1.0,,1,750,high,3.2\n", r"results.csv, line 2: could not convert .*'high'"),
        (HEADER + "full,1.0,,1\n", r"results.csv, line 2: "),
        (HEADER + "full,1.0,,1,750,nan,3.2\n", r"line 2: test_accuracy: must be >= 0, got nan\.$"),
        (HEADER + "full,1.0,,1,750,inf,3.2\n", r"line 2: test_accuracy: .* got inf"),
        (HEADER + "full,1.0,,1,750,-1,3.2\n", r"line 2: test_accuracy: .* got -1"),
        (HEADER + "full,1.0,,1,750,100.5,3.2\n", r"line 2: test_accuracy: must be <= 100, got 100"),
        (HEADER + "random,nan,,1,750,50,3.2\n", r"line 2: keep_fraction: .* got nan"),
        (HEADER + "random,30,,1,750,50,3.2\n", r"line 2: keep_fraction: must be <= 1, got 30"),
        (HEADER + "flexrand,0.3,inf,1,750,50,3.2\n", r"line 2: split: .* got inf"),
        (HEADER + "random,0.3,,-1,750,50,3.2\n", r"line 2: seed: .* got -1"),
        (
            HEADER + 2 * "flexrand,0.3,0.5,1,225,50,3.2\n",
            r"line 3: the run flexrand \(split 0.5\), keep fraction 0.3, seed 1 is there twice",
        ),
        (
            HEADER.strip() + ",test_loss\nfull,1.0,,1,750,50,3.2,nan\n",
            r"line 2: test_loss: must be >= 0, got nan",
        ),
        (
            HEADER.strip() + ",test_accuracy\nfull,1.0,,1,750,50,3.2,60\n",
            "results.csv: the column 'test_accuracy' is there twice",
        ),
        (HEADER + "x" * 200_000 + ",1.0,,1,750,50,3.2\n", "csv: not a table of results: .*limit"),
        (HEADER + "\udce9,1.0,,1,750,50,3.2\n", "csv: not a table of results: .*utf-8"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, says):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(expect.InputError, match=says):
        read_results(path)


def test_splits_that_are_almost_equal_are_two_methods(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(
        HEADER + "".join(f"flexrand,0.3,0.3333333{k},1,225,{50 + k},3.2\n" for k in (1, 2))
    )
    rows = summarise(read_results(path))
    assert [(row.label, row.accuracy.mean) for row in rows] == [
        ("flexrand (split 0.33333331)", 51.0),
        ("flexrand (split 0.33333332)", 52.0),
    ]


def test_text_in_figures_and_tables_is_no_formula_and_no_markup(tmp_path):
    title = "csv:/data/$x_{/a$\x1b.csv, resnet18"
    rows = [*SWEEP, *results("$\\x_{|<b>", 0.5, [60.0, 63.9, 62.0])]
    figure = gap_to_random(summarise(rows), title)
    figure.savefig(tmp_path / "x.png")
    assert figure.axes[0].get_title() == title.replace("\x1b", "\\x1b")
    table = results_table(summarise(rows)).splitlines()
    assert any(r"| $\\x\_{\|&lt;b&gt; " in line for line in table)


def test_methods_that_look_like_formulas_come_back(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(HEADER + "'=1+1,0.3,0.5,2,225,61.25,1.0\n")
    assert read_results(path)[0].method == "=1+1"
