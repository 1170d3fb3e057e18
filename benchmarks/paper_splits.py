"""Was choosing FlexRand's split worth it? The paper's own validation accuracies, read again.

python -m benchmarks.paper_splits

Trains nothing: reads the numbers in dlc_jax/reports/paper, five data sets at nine keep fractions
with 19 splits each. Prints a line per data set and keep fraction, and what all 45 say together.
docs/reproduction.md shows the output and explains the columns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dlc_jax.reports.paper import PaperAccuracy, PaperSplit, read_paper
from dlc_jax.reports.table import markdown

USUAL = 0.5
_ROUNDING = 1e-9  # of splits and accuracies, which have two decimals


class Cell(NamedTuple):
    """Validation accuracies of one data set at one keep fraction.

    Attributes:
      dataset: Its name in the paper's files.
      keep_fraction: Fraction kept.
      splits: [s] splits, ascending, 0.05 apart.
      accuracy: [s] in percent.
    """

    dataset: str
    keep_fraction: float
    splits: Float64[np.ndarray, " s"]
    accuracy: Float64[np.ndarray, " s"]

    @property
    def usual(self) -> float:
        """Accuracy at split 0.5, in percent."""
        return float(self.accuracy[np.isclose(self.splits, USUAL)][0])

    @property
    def cost(self) -> float:
        """What 0.5 loses against the best split, in points."""
        return float(self.accuracy.max()) - self.usual

    @property
    def best(self) -> Float64[np.ndarray, " b"]:
        """The best split; all of them, ascending, where several are equally good."""
        return self.splits[self.accuracy >= self.accuracy.max() - _ROUNDING]

    @property
    def is_halved(self) -> np.ndarray:
        """[s] whether half of what is kept is easy and half hard: splits from k/2 to 1 - k/2."""
        half = self.keep_fraction / 2 - _ROUNDING
        return (self.splits >= half) & (self.splits <= 1 - half)

    @property
    def is_best_halved(self) -> bool:
        """Whether a best split is among those."""
        return bool(self.is_halved[np.isin(self.splits, self.best)].any())

    @property
    def noise(self) -> float:
        """Standard deviation of an accuracy, in points, by neighbouring splits of the same kind.

        It is too high as far as neighbours differ in truth.
        """
        is_pair = self.is_halved[1:] == self.is_halved[:-1]
        return float(np.sqrt(np.square(np.diff(self.accuracy)[is_pair]).mean() / 2))


def read_cells() -> list[Cell]:
    """Returns all cells, in the order of the paper's file."""
    found: dict[tuple[str, float], list[PaperSplit]] = {}
    for row in read_paper(PaperSplit):
        found.setdefault((row.dataset, row.keep_fraction), []).append(row)
    return [
        Cell(*key, *np.array([(row.split, row.accuracy) for row in sorted(rows)]).T)
        for key, rows in found.items()
    ]


def chosen_elsewhere(cell: Cell, cells: Sequence[Cell]) -> float:
    """Returns the gain over 0.5, in points, of the split that is best at other keep fractions.

    It is the one of the highest mean accuracy over the other cells of the data set, so that the
    noise of this cell has no part in the choice.
    """
    others = [
        other.accuracy
        for other in cells
        if other.dataset == cell.dataset and other.keep_fraction != cell.keep_fraction
    ]
    return float(cell.accuracy[np.mean(others, axis=0).argmax()]) - cell.usual


def luck(number: int) -> float:
    """Returns the mean of the largest of so many standard normal numbers."""
    from scipy.special import ndtr

    x = np.linspace(-9, 9, 20_001)
    density = number * ndtr(x) ** (number - 1) * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(x * density) * (x[1] - x[0]))


def table(cells: Sequence[Cell]) -> str:
    """Returns a line of Markdown per cell."""
    header = ("data set", "keep", "best split", "halved", "best, %", "0.5, %", "cost of 0.5")
    rows = [
        (
            cell.dataset,
            f"{cell.keep_fraction:g}",
            ", ".join(f"{split:g}" for split in cell.best),
            "yes" if cell.is_best_halved else "no",
            f"{cell.accuracy.max():.2f}",
            f"{cell.usual:.2f}",
            f"{cell.cost:.2f}",
            f"{cell.noise:.2f}",
            f"{luck(len(cell.splits)) * cell.noise:.2f}",
            f"{chosen_elsewhere(cell, cells):+.2f}",
        )
        for cell in cells
    ]
    return markdown((*header, "noise", "luck", "chosen elsewhere"), rows)


def summary(cells: Sequence[Cell]) -> str:
    """Returns what cells say together, by data set and by how much is kept, as Markdown."""
    costs = np.array([cell.cost for cell in cells])
    lucky = np.array([luck(len(cell.splits)) * cell.noise for cell in cells])
    elsewhere = np.array([chosen_elsewhere(cell, cells) for cell in cells])
    halved = sum(cell.is_best_halved for cell in cells)
    by_chance = sum(float(cell.is_halved.mean()) for cell in cells)
    usual = sum(bool(np.isclose(cell.best, USUAL).any()) for cell in cells)
    accuracy = {row[:3]: row.accuracy for row in read_paper(PaperAccuracy)}
    gaps = np.array(
        [
            accuracy[cell.dataset, "dlc_flexrand", cell.keep_fraction]
            - accuracy[cell.dataset, "random", cell.keep_fraction]
            for cell in cells
        ]
    )
    names = np.array([cell.dataset for cell in cells])
    keep_fractions = np.array([cell.keep_fraction for cell in cells])
    groups = {name: names == name for name in dict.fromkeys(names)}
    groups |= {"keep 0.1 and 0.2": keep_fractions < 0.25, "keep 0.3 to 0.9": keep_fractions > 0.25}
    groups["all"] = np.ones(len(cells), bool)
    rows = [
        (name, *(f"{values[group].mean():.2f}" for values in (costs, lucky, elsewhere, gaps)))
        for name, group in groups.items()
    ]
    header = ("mean, points", "cost of 0.5", "luck", "chosen elsewhere", "FlexRand - random, test")
    most = [cell for cell in cells if np.isclose(cell.keep_fraction, 0.9)]
    gained, spread, noise = np.mean(
        [(cell.cost, cell.accuracy.std(ddof=1), cell.noise) for cell in most], axis=0
    )
    lines = [
        f"- The best split is halved in {halved} of {len(cells)} cells; {by_chance:.1f} would be "
        f"if every split were as likely. 0.5 is the best in {usual}.",
        f"- Always 0.5 costs {costs.mean():.2f} points on average, {np.median(costs):.2f} in the "
        f"median, {costs.max():.2f} at most.",
        f"- The cost is above what luck alone gives in {int((costs > lucky).sum())} of "
        f"{len(cells)} cells.",
        f"- A split chosen elsewhere is better than 0.5 in {int((elsewhere > 0).sum())} cells and "
        f"worse in {int((elsewhere < 0).sum())}.",
        f"- At keep fraction 0.9 the best split is {gained:.2f} points above 0.5 on average; the "
        f"standard deviation of the accuracies at all splits is {spread:.2f} there, the noise "
        f"{noise:.2f}.",
    ]
    return "\n".join(lines) + "\n\n" + markdown(header, rows)


def output() -> str:
    """Returns all that the program prints."""
    cells = read_cells()
    return f"{table(cells)}\n\n{summary(cells)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(output())


if __name__ == "__main__":
    main()
