"""Did pruning help? Accuracy and gap to random of every method, with intervals over seeds."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlc_jax import expect
from dlc_jax.expect import csv_text
from dlc_jax.reports.table import markdown
from dlc_jax.selection import AUTO

_CONFIDENCE = 0.95
_ROUNDING = 1e-9  # points; differences of equal percentages differ by less
_REFERENCES = ("base", "full", "random")
_NEEDED = ("method", "keep_fraction", "split", "seed", "test_accuracy")


class Result(NamedTuple):
    """A row of `results.csv`, and what the provenance adds.

    Attributes:
      split: FlexRand's gamma, or `auto`.
      test_accuracy: In percent.
      pruning_seconds: What it took to know what to keep; NaN where that is not known.
      test_loss: Loss on instructions, in nats per response token; NaN where it was not measured.
    """

    method: str
    keep_fraction: float
    split: float | str | None
    seed: int
    test_accuracy: float
    pruning_seconds: float = math.nan
    test_loss: float = math.nan

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return self.method if self.split is None else f"{self.method} (split {self.split})"


@dataclasses.dataclass(frozen=True)
class SeedMean:
    """Mean over seeds and half the width of its 95 % interval (Student's t).

    Attributes:
      mean: In percentage points.
      half_width: NaN for a single seed.
      num_seeds: How many values.
    """

    mean: float
    half_width: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedMean:
        """Returns the interval of one or more values."""
        from scipy import stats  # a third of a second, which only reports need

        number, mean = len(values), float(np.mean(values))
        if number < 2:
            return cls(mean, math.nan, number)
        quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, number - 1))
        return cls(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(number), number)

    def __str__(self) -> str:
        half = "" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{half}"


class Row(NamedTuple):
    """A method at a keep fraction.

    Attributes:
      gap: To random at the same keep fraction, paired by seed; None for random, for the full set,
        and where no seed was run with both.
      pruning_seconds: What it took to know what to keep; NaN where that is not known.
      test_loss: Mean over seeds; NaN where it was not measured.
    """

    label: str
    keep_fraction: float
    accuracy: SeedMean
    gap: SeedMean | None
    pruning_seconds: float = math.nan
    test_loss: float = math.nan

    @property
    def verdict(self) -> str:
        """What the gap says, in words."""
        if self.gap is None:
            return "" if self.label in _REFERENCES else "random was not run with these seeds"
        mean, half = self.gap.mean, self.gap.half_width
        if not half > _ROUNDING:  # no noise was seen, which does not mean that there is none
            why = "one seed" if math.isnan(half) else "all gaps equal"
            return f"{'above' if mean > 0 else 'not better than'} random ({why}, no interval)"
        if mean - half > 0:
            return "better than random"
        return "not better than random" + (": worse" if mean + half < 0 else "")


def read_results(path: Path) -> list[Result]:
    """Reads `results.csv`, without rows of runs whose accuracy was not measured.

    Raises:
      ValueError: it is not there, has no rows, or is not such a table; a number that is out of
        range, or a run that occurs twice.
    """
    if not path.is_file():
        raise expect.InputError(f"{path}: not there; run the stage 'finetune' first.")
    problem = f"{path}: not a table of results"
    with (
        expect.refusing(problem, csv.Error, UnicodeDecodeError, shown=expect.first_line),
        open(path, newline="", encoding="utf-8-sig") as file,
    ):
        return _read_table(path, csv.DictReader(file))


def _read_table(path: Path, table: csv.DictReader) -> list[Result]:
    names = table.fieldnames or ()
    if missing := [name for name in _NEEDED if name not in names]:
        raise expect.InputError(f"{path}: has no column {', '.join(missing)}.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise expect.InputError(f"{path}: the column {twice!r} is there twice.")
    results: dict[tuple[Any, ...], Result] = {}
    what = "has no rows; every run failed or none was finished."
    for row in table:
        if row["test_accuracy"] == "":  # of instructions, until the stage evaluate
            what = "no run has a test_accuracy; run the stage 'evaluate' first."
            continue
        place = f"{path}, line {table.line_num}"
        try:
            result = _result(row)
        except (TypeError, ValueError) as error:
            raise expect.InputError(f"{place}: {str(error).removesuffix('.')}.") from error
        if result[:4] in results:
            shown = f"{result.label}, keep fraction {result.keep_fraction:g}, seed {result.seed}"
            raise expect.InputError(
                f"{place}: the run {shown} is there twice; expected each run once."
            )
        results[result[:4]] = result
    if not results:
        raise expect.InputError(f"{path}: {what}")
    return list(results.values())


def _result(row: dict[str, str]) -> Result:
    """Reads a row; raises ValueError or TypeError for what cannot be."""
    split: float | str | None = row["split"] or None
    if split not in (None, AUTO):
        split = float(row["split"])
        expect.split(split)
    keep_fraction, accuracy = float(row["keep_fraction"]), float(row["test_accuracy"])
    expect.at_least("keep_fraction", keep_fraction, 0)
    expect.at_most("keep_fraction", keep_fraction, 1)
    expect.at_least("test_accuracy", accuracy, 0)
    expect.at_most("test_accuracy", accuracy, 100)
    seed = int(row["seed"])
    expect.seed(seed)
    loss = math.nan
    if row.get("test_loss"):
        loss = float(row["test_loss"])
        expect.at_least("test_loss", loss, 0)
    return Result(csv_text(row["method"]), keep_fraction, split, seed, accuracy, test_loss=loss)


def summarise(results: Sequence[Result]) -> list[Row]:
    """Returns a row per method, split and keep fraction, in the order of first appearance."""
    groups: dict[tuple[str, float], dict[int, Result]] = {}
    for result in results:
        groups.setdefault((result.label, result.keep_fraction), {})[result.seed] = result
    rows = []
    for (label, keep_fraction), by_seed in groups.items():
        random = groups.get(("random", keep_fraction), {})
        pairs = [
            by_seed[seed].test_accuracy - random[seed].test_accuracy
            for seed in by_seed
            if seed in random and label not in _REFERENCES
        ]
        accuracy = SeedMean.of([result.test_accuracy for result in by_seed.values()])
        seconds = [result.pruning_seconds for result in by_seed.values()]
        gap = SeedMean.of(pairs) if pairs else None
        loss = float(np.mean([result.test_loss for result in by_seed.values()]))
        rows.append(Row(label, keep_fraction, accuracy, gap, float(np.mean(seconds)), loss))
    return rows


def results_table(rows: Sequence[Row]) -> str:
    """Returns Markdown: accuracy, gap to random and what that means, by keep fraction."""
    has_loss = not all(math.isnan(row.test_loss) for row in rows)
    header = ["keep", "method", "seeds", "test accuracy, %", "gap to random", "", "pruning, s"]
    header += ["test loss"] * has_loss
    lines = []
    for row in sorted(rows, key=lambda row: -row.keep_fraction):
        gap = "" if row.gap is None else ("+" if row.gap.mean > 0 else "") + str(row.gap)
        if row.gap is not None and row.gap.num_seeds < row.accuracy.num_seeds:
            gap += f" ({row.gap.num_seeds} of {row.accuracy.num_seeds} seeds)"
        seconds = "" if math.isnan(row.pruning_seconds) else f"{row.pruning_seconds:.1f}"
        loss = "" if math.isnan(row.test_loss) else f"{row.test_loss:.4f}"
        measured = (str(row.accuracy.num_seeds), str(row.accuracy), gap, row.verdict, seconds, loss)
        lines.append((f"{row.keep_fraction:g}", row.label, *measured)[: len(header)])
    return markdown(header, lines)
