"""The program that reads the paper's validation accuracies again, and the page that shows it."""

import csv

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import paper_splits
from benchmarks.paper_splits import Cell, chosen_elsewhere, luck, output, read_cells

FILE = ROOT / "dlc_jax" / "reports" / "paper" / "validation_by_split.csv"


@pytest.fixture(scope="module")
def accuracies() -> dict[tuple[str, int], np.ndarray]:
    """[19] accuracies by data set and tenths kept, read by itself."""
    with open(FILE, newline="") as file:
        rows = list(csv.reader(file))[1:]
    found: dict = {}
    for name, keep, split, accuracy in rows:
        column = round(float(split) * 20) - 1
        found.setdefault((name, round(float(keep) * 10)), np.zeros(19))[column] = float(accuracy)
    return found


def test_the_page_shows_what_the_program_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["paper_splits"])
    paper_splits.main()
    printed = capsys.readouterr().out
    assert printed.strip() == output()
    assert output() in (ROOT / "docs" / "reproduction.md").read_text()


def test_every_cell_has_the_best_split_and_what_the_usual_one_costs(accuracies):
    cells = read_cells()
    assert len(cells) == len(accuracies) == 45
    for cell in cells:
        mine = accuracies[cell.dataset, round(cell.keep_fraction * 10)]
        np.testing.assert_array_equal(cell.accuracy, mine)
        best = [round(0.05 * (i + 1), 2) for i in range(19) if mine[i] == max(mine)]
        assert cell.best.tolist() == best
        assert cell.cost == pytest.approx(max(mine) - mine[9])
        # in twentieths, which are exact
        tenths = round(cell.keep_fraction * 10)
        halved = [tenths <= i + 1 <= 20 - tenths for i in range(19)]
        assert cell.is_halved.tolist() == halved
        assert cell.is_best_halved == any(
            halved[i] for i in range(19) if round(0.05 * (i + 1), 2) in best
        )


def test_the_lines_below_the_table_count_all_cells(accuracies):
    costs = np.array([max(a) - a[9] for a in accuracies.values()])
    halved = [
        any(keep <= i + 1 <= 20 - keep for i in np.flatnonzero(a == a.max()))
        for (_, keep), a in accuracies.items()
    ]
    chance = sum((21 - 2 * keep) / 19 if keep > 1 else 1.0 for _, keep in accuracies)
    elsewhere = []
    for (name, keep), mine in accuracies.items():
        others = sum(accuracies[name, other] for other in range(1, 10) if other != keep)
        elsewhere.append(mine[others.argmax()] - mine[9])
    text = output()
    assert f"halved in {sum(halved)} of 45 cells; {chance:.1f} would be" in text
    assert f"costs {costs.mean():.2f} points on average, {np.median(costs):.2f} in the" in text
    assert f"better than 0.5 in {sum(e > 0 for e in elsewhere)} cells" in text
    means = [line for line in text.splitlines() if line.startswith("| all ")]
    cells = [float(cell) for cell in means[0].split("|")[2:-1]]
    assert cells[0] == pytest.approx(costs.mean(), abs=0.0051)
    assert cells[2] == pytest.approx(np.mean(elsewhere), abs=0.0051)


def drawn(seed: int, keep_fraction: float = 0.9, trend: float = 0.0) -> Cell:
    """Accuracies of equally good splits with a noise of 2 points; or better by the split."""
    splits = np.round(0.05 * np.arange(1, 20), 2)
    noise = np.random.default_rng(seed).normal(0, 2, 19)
    return Cell("drawn", keep_fraction, splits, 50 + trend * splits + noise)


def test_noise_and_luck_are_those_of_drawn_accuracies():
    cells = [drawn(seed) for seed in range(2000)]
    assert np.sqrt(np.mean([cell.noise**2 for cell in cells])) == pytest.approx(2, rel=0.03)
    assert np.mean([cell.cost for cell in cells]) == pytest.approx(2 * luck(19), rel=0.03)
    assert luck(1) == pytest.approx(0, abs=1e-9)
    assert luck(2) == pytest.approx(1 / np.sqrt(np.pi))


def test_a_split_chosen_elsewhere_gains_what_is_true_and_nothing_by_luck():
    keeps = [i / 10 for i in range(1, 10)]
    equal = [[drawn(9 * n + i, keep) for i, keep in enumerate(keeps)] for n in range(200)]
    gains = [chosen_elsewhere(cells[4], cells) for cells in equal]
    assert np.mean(gains) == pytest.approx(0, abs=4 * np.sqrt(8 / 200))
    trend = [drawn(i, keep, trend=100.0) for i, keep in enumerate(keeps)]
    assert chosen_elsewhere(trend[4], trend) == trend[4].accuracy[18] - trend[4].accuracy[9]
