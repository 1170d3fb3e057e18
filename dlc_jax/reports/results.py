"""Did pruning help? Accuracy and gap to random, with intervals over seeds and test samples."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from dlc_jax import expect
from dlc_jax.expect import csv_text
from dlc_jax.reports.table import markdown
from dlc_jax.selection import AUTO
from dlc_jax.tuning.gaps import CONFIDENCE, crossed, holm, two_sided

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
      right: [t] whether the run was right about each test sample, the same ones in all runs; None
        where that is not known.
    """

    method: str
    keep_fraction: float
    split: float | str | None
    seed: int
    test_accuracy: float
    pruning_seconds: float = math.nan
    test_loss: float = math.nan
    right: Bool[np.ndarray, " t"] | None = None

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return self.method if self.split is None else f"{self.method} (split {self.split})"


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds with half the width of its 95 % interval.

    Attributes:
      mean: In percentage points.
      half_width: NaN where neither seeds nor test samples could be compared.
      num_seeds: How many runs.
      num_samples: Test samples that the interval is over as well; 0: over seeds alone.
      p_value: Two-sided, that the mean is 0; 1 where there is no interval.
    """

    mean: float
    half_width: float
    num_seeds: int
    num_samples: int = 0
    p_value: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Returns the interval over seeds of one or more values (Student's t)."""
        table = np.asarray(values, np.float64)[:, None]
        found = crossed(table)
        half = found.half_width if len(values) > 1 else math.nan
        return cls(found.mean, half, len(values), 0, two_sided(table, crossed))

    @classmethod
    def of_samples(cls, values: Shaped[np.ndarray, "s t"]) -> Mean:
        """Returns the interval over seeds and test samples of what each run showed on each."""
        table = 100 * np.asarray(values, np.float64)
        found, (num_seeds, num_samples) = crossed(table), table.shape
        p_value = two_sided(table, crossed)
        return cls(found.mean, found.half_width, num_seeds, num_samples, p_value)

    @property
    def is_tested(self) -> bool:
        """Whether it is known how much it varies between seeds."""
        return self.num_seeds > 1 and self.half_width > _ROUNDING

    def __str__(self) -> str:
        half = "" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{half}"


class Row(NamedTuple):
    """A method at a keep fraction.

    Attributes:
      gap: To random at the same keep fraction, paired by seed and test sample; None for random, for
        the full set, and where no seed was run with both.
      pruning_seconds: What it took to know what to keep; NaN where that is not known.
      test_loss: Mean over seeds; NaN where it was not measured.
      p_value: How likely so large a gap is where there is none, corrected for all gaps (Holm).
    """

    label: str
    keep_fraction: float
    accuracy: Mean
    gap: Mean | None
    pruning_seconds: float = math.nan
    test_loss: float = math.nan
    p_value: float = 1.0

    @property
    def verdict(self) -> str:
        """What the gap says, in words."""
        if self.gap is None:
            return "" if self.label in _REFERENCES else "random was not run with these seeds"
        mean = self.gap.mean
        if not self.gap.is_tested:
            why = "one seed" if self.gap.num_seeds == 1 else "all gaps equal, no interval"
            return f"{'above' if mean > 0 else 'not better than'} random ({why})"
        is_beyond = self.p_value <= 1 - CONFIDENCE
        if is_beyond and mean > 0:
            return "better than random"
        return "not better than random" + (": worse" if is_beyond else "")


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
        random = groups.get(("random", keep_fraction), {}) if label not in _REFERENCES else {}
        pairs = [(by_seed[seed], random[seed]) for seed in by_seed if seed in random]
        accuracy = _mean([(result, None) for result in by_seed.values()])
        seconds = [result.pruning_seconds for result in by_seed.values()]
        gap = _mean(pairs) if pairs else None
        loss = float(np.mean([result.test_loss for result in by_seed.values()]))
        rows.append(Row(label, keep_fraction, accuracy, gap, float(np.mean(seconds)), loss))
    gaps = [row.gap for row in rows if row.gap is not None and row.gap.is_tested]
    corrected = iter(holm([gap.p_value for gap in gaps]))
    return [
        row._replace(p_value=next(corrected)) if row.gap is not None and row.gap.is_tested else row
        for row in rows
    ]


def _mean(pairs: Sequence[tuple[Result, Result | None]]) -> Mean:
    """Returns the mean accuracy of runs, or of how much they are above others."""
    by_sample = []
    for one, other in pairs:
        if one.right is not None and other is None:
            by_sample.append(one.right.astype(np.int8))
        elif one.right is not None and other is not None and other.right is not None:
            by_sample.append(one.right.astype(np.int8) - other.right.astype(np.int8))
    if len(by_sample) == len(pairs):
        return Mean.of_samples(np.stack(by_sample))
    return Mean.of(
        [one.test_accuracy - (0 if other is None else other.test_accuracy) for one, other in pairs]
    )


def results_table(rows: Sequence[Row]) -> str:
    """Returns Markdown: accuracy, gap to random and what that means, by keep fraction.

    Below the table: what the intervals are over, and how many gaps the words are corrected for.
    """
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
    means = [row.accuracy for row in rows] + [row.gap for row in rows if row.gap is not None]
    num_samples = {mean.num_samples for mean in means}
    over = "seeds" if num_samples == {0} else f"seeds and {max(num_samples):,} test samples"
    if len(num_samples) > 1:
        over += " (over seeds alone where a run has no predictions.npz)"
    if over != "seeds" and any(mean.num_seeds == 1 for mean in means):
        over += " (over test samples alone of one seed)"
    num_gaps = sum(row.gap is not None and row.gap.is_tested for row in rows)
    said = f"± is half of a 95 % interval over {over}; random and a method are compared run by run"
    said += " and sample by sample" * (over != "seeds")
    if num_gaps:
        together = f"all {num_gaps} gaps together (Holm)" if num_gaps > 1 else "the one gap"
        said += f". Better or worse: with 95 % confidence for {together}"
    return f"{markdown(header, lines)}\n\n{said}."
