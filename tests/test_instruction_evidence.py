"""The program behind the page of evidence: its limit, its gaps, its intervals."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks.instruction_methods import WAYS, Way, limit_for, table


def test_the_limit_leaves_a_fifth_with_a_near_duplicate_before_it():
    features = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    limit = limit_for(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    before = [(unit[i] @ unit[:i].T > limit).any() for i in range(1, 200)]
    assert sum(before) == pytest.approx(40, abs=1)


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {(row[0], row[1]): row[2:] for row in rows}


@pytest.mark.slow
def test_gaps_are_shares_of_what_all_rows_gain_and_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    hard = generator.normal(3, 1, size=50).astype(np.float32)  # how hard each held-out row is
    noise = generator.normal(0, 0.01, size=(3, 3, 50)).astype(np.float32)
    better, same = Way("longest", "length"), Way("hardest", "perplexity", is_deduplicated=True)
    reference, found = hard + noise[0], {better: hard - 0.25 + noise[1], same: hard + noise[2]}
    base, full = hard + 2, np.stack([hard - 0.5] * 3)
    tokens = dict.fromkeys([WAYS[0], better, same], 1234)
    lengths = generator.integers(1, 100, 50)
    rows = cells(table({WAYS[0]: reference} | found, base, full, lengths, tokens))
    assert rows["random", "kept"][1:3] == ["-", "-"]
    assert rows["random", "kept"][-1] == "1,234"
    row, shares = rows["longest", "kept"], lengths / lengths.sum()
    for (loss, gap, interval), weights in ((row[:3], np.full(50, 0.02)), (row[3:6], shares)):
        assert float(loss) == pytest.approx(found[better].mean(axis=0) @ weights, abs=5e-5)
        # the same rows are drawn for both: how hard they are does not widen the interval
        expected = 100 * (reference - found[better]).mean(axis=0) @ weights / 2.5
        assert float(gap) == pytest.approx(expected, abs=0.051)
        low, high = map(float, interval.split(" to "))
        assert 9 < low < 10 < high < 11
    low, high = map(float, rows["hardest by perplexity", "left out"][2].split(" to "))
    assert low < 0 < high


@pytest.mark.long
def test_the_whole_program_on_a_few_rows(tmp_path):
    command = [sys.executable, "-m", "benchmarks.instruction_methods", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*command, "--rows=20", "--max_length=128"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.npy"))) == 3 * (1 + 2 * len(WAYS))
    assert done.stdout.count("| left out ") == len(WAYS)
    again = subprocess.run(
        [*command, "--rows=20", "--max_length=128"], cwd=ROOT, capture_output=True, text=True
    )
    assert "seed" not in again.stdout  # nothing is run twice
    assert again.stdout.strip() == done.stdout[-len(again.stdout) :].strip()
