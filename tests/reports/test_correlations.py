"""What DLC adds to other scores, against scipy and by hand."""

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from dlc_jax.reports import what_dlc_adds
from dlc_jax.reports.correlations import partial_rank_correlation, share_beyond


@pytest.fixture
def scores():
    """Three scores with ties that have something of each other."""
    generator = np.random.default_rng(0)
    length = generator.integers(5, 30, 200).astype(np.float32)
    perplexity = np.exp(generator.normal(size=200) - length / 20).astype(np.float32)
    dlc = np.log(perplexity) + generator.normal(0, 0.3, 200) + length / 50
    return {"dlc": dlc.astype(np.float32), "perplexity": perplexity, "length": length}


def test_correlations_are_those_of_scipy_and_of_the_formula(scores):
    dlc, perplexity, length = scores.values()
    found = partial_rank_correlation(dlc, perplexity)
    assert found == pytest.approx(spearmanr(dlc, perplexity).statistic)
    ab, ac, bc = (
        spearmanr(*pair).statistic
        for pair in ((dlc, perplexity), (dlc, length), (perplexity, length))
    )
    by_formula = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))  # Kendall's
    assert partial_rank_correlation(dlc, perplexity, [length]) == pytest.approx(by_formula)
    ranks = np.stack([rankdata(some) for some in (perplexity, length)], axis=1)
    design = np.column_stack([np.ones(200), ranks])
    fitted = design @ np.linalg.lstsq(design, rankdata(dlc), rcond=None)[0]
    share = 1 - pearsonr(fitted, rankdata(dlc)).statistic ** 2
    assert share_beyond(dlc, [perplexity, length]) == pytest.approx(share)


def test_a_copy_adds_nothing(scores):
    copy = np.exp(scores["perplexity"])  # of the same order
    assert partial_rank_correlation(copy, scores["perplexity"]) == pytest.approx(1)
    assert share_beyond(copy, [scores["perplexity"], scores["length"]]) == 0
    assert np.isnan(partial_rank_correlation(copy, scores["length"], [scores["perplexity"]]))
    line = what_dlc_adds(scores | {"dlc": copy})
    assert "perplexity 1.00 (1.00 at equal length)" in line
    assert "(nothing is left at equal perplexity)" in line
    assert line.endswith("; 0% of its ranking is in neither")


def test_the_line_says_all_five_numbers(scores):
    dlc, perplexity, length = scores.values()
    line = what_dlc_adds(scores)
    assert f"with perplexity {spearmanr(dlc, perplexity).statistic:.2f} (" in line
    assert f"with length {spearmanr(dlc, length).statistic:.2f} (" in line
    assert f"({partial_rank_correlation(dlc, length, [perplexity]):.2f} at equal perplex" in line
    assert f"; {share_beyond(dlc, [perplexity, length]):.0%} of its ranking" in line


def test_nothing_is_said_of_images_or_of_a_few(scores):
    assert what_dlc_adds({"dlc": scores["dlc"]}) == ""
    assert what_dlc_adds({name: some[:4] for name, some in scores.items()}) == ""
    for name in scores:
        assert what_dlc_adds(scores | {name: np.ones(200, np.float32)}) == ""
