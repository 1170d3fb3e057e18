"""What the paper reports, as numbers: its figures and a table, read from CSV files beside this one.

Source: Jiang et al. 2025; README.md in this folder says how the files came about.
"""

from __future__ import annotations

import csv
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar


class PaperAccuracy(NamedTuple):
    """Test accuracy of a ResNet-18, fully pre-trained, on one of five data sets.

    Attributes:
      dataset: CXRB10, DeepWeeds, DTD, FGVCAircraft or Sketch.
      method: Name as in `selection.methods`; `dlc_flexrand` is FlexRand by DLC, with the split
        chosen on validation data.
      keep_fraction: Fraction kept.
      accuracy: Mean over three seeds, in percent.
      std: Standard deviation over seeds, in points; NaN where none is given.
    """

    dataset: str
    method: str
    keep_fraction: float
    accuracy: float
    std: float


class PaperSplit(NamedTuple):
    """Validation accuracy of FlexRand at a split.

    Attributes:
      dataset: As in `PaperAccuracy`.
      keep_fraction: Fraction kept.
      split: FlexRand's gamma, the share of a class that counts as easy.
      accuracy: In percent.
    """

    dataset: str
    keep_fraction: float
    split: float
    accuracy: float


class PaperCost(NamedTuple):
    """What a method costs and gives.

    Attributes:
      method: As in `PaperAccuracy`.
      pruning_seconds: Time to know what to keep; NaN for random.
      mean_accuracy: Mean test accuracy, in percent.
    """

    method: str
    pruning_seconds: float
    mean_accuracy: float


class PaperPath(NamedTuple):
    """What the length of the learning path changes.

    Attributes:
      num_probes: Masked networks on the path.
      mean_accuracy: Mean test accuracy, in percent.
      spearman_with_training_complexity: Rank correlation of DLC with the complexity measured by
        training, in [-1, 1].
      pruning_seconds: Time to know what to keep.
    """

    num_probes: int
    mean_accuracy: float
    spearman_with_training_complexity: float
    pruning_seconds: float


class PaperMmlu(NamedTuple):
    """MMLU after LoRA on half of the instructions.

    Attributes:
      dataset: alpaca_cleaned or dolly_hhrlhf.
      model: mistral-7b, llama3-8b or gemma2-9b.
      mmlu_group: humanities, social_sciences, stem or other.
      random: Accuracy with a random half, in percent.
      dlc_flexrand: Accuracy with FlexRand's half by DLC, in percent.
    """

    dataset: str
    model: str
    mmlu_group: str
    random: float
    dlc_flexrand: float


_FILES: dict[type[Any], str] = {
    PaperAccuracy: "images_by_keep_fraction.csv",
    PaperSplit: "validation_by_split.csv",
    PaperCost: "pruning_time_and_mean_accuracy.csv",
    PaperPath: "path_length.csv",
    PaperMmlu: "instructions_mmlu.csv",
}
_READ: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: lambda value: float(value or math.nan),
}
Kind = TypeVar("Kind", PaperAccuracy, PaperSplit, PaperCost, PaperPath, PaperMmlu)


def read_paper(kind: type[Kind]) -> list[Kind]:
    """Returns the paper's numbers of a kind, in the order of their file.

    Args:
      kind: `PaperAccuracy`, `PaperSplit`, `PaperCost`, `PaperPath` or `PaperMmlu`, whose attributes
        are the columns of the file.
    Example:
      >>> from dlc_jax.reports.paper import PaperCost, read_paper
      >>> {row.method: row.pruning_seconds for row in read_paper(PaperCost)}["dlc_flexrand"]
      29.5
    """
    kinds = typing.get_type_hints(kind)
    with open(Path(__file__).parent / _FILES[kind], newline="") as file:
        return [
            kind(**{name: _READ[kinds[name]](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]
