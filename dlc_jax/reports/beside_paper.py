"""A run of one of the paper's data sets beside the paper's numbers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dlc_jax.expect import markdown_text
from dlc_jax.reports.paper import PaperAccuracy, PaperMmlu, read_paper
from dlc_jax.reports.results import Result
from dlc_jax.reports.table import markdown

# Methods of the paper that have another name here; what they select by is DLC.
_OURS = {"dlc_flexrand": "flexrand"}
_REFERENCES = ("base", "full")  # without numbers in the paper
_COMPARED = ("seeds", "ours, %", "paper, %", "ours - paper, points")
_MMLU_KEEP_FRACTION = 0.5  # of the runs that the paper asks MMLU


class _DataSet(NamedTuple):
    """One of the paper's data sets, as the sources of configs/ and their docstrings name it."""

    name: str
    num_classes: int
    train: str  # patterns, in which * is any text
    test: str
    is_split_known: bool

    def is_this(self, train: str, test: str, num_classes: int) -> bool:
        pairs = ((train, self.train), (test, self.test))
        is_named = all(fnmatch.fnmatchcase(source, pattern) for source, pattern in pairs)
        return is_named and num_classes == self.num_classes


_DATA_SETS = (
    _DataSet("DTD", 47, "tfds:dtd/train+validation", "tfds:dtd/test", True),
    _DataSet("FGVCAircraft", 100, "fgvc_aircraft:*/train+val", "fgvc_aircraft:*/test", True),
    _DataSet(
        "DeepWeeds",
        9,
        "split:60/20/20:train+validation:tfds:deep_weeds/train",
        "split:60/20/20:test:tfds:deep_weeds/train",
        False,
    ),
    _DataSet("DeepWeeds", 9, "folder:*/DeepWeeds/train+val", "folder:*/DeepWeeds/test", False),
    _DataSet(
        "Sketch",
        250,
        "split:60/20/20:train+validation:folder:*/sketch",
        "split:60/20/20:test:folder:*/sketch",
        False,
    ),
    _DataSet("Sketch", 250, "folder:*/Sketch/train+val", "folder:*/Sketch/test", False),
    _DataSet("CXRB10", 10, "folder:*/CXRB10/train+val", "folder:*/CXRB10/test", False),
)
_INSTRUCTIONS = {
    "hf:yahma/alpaca-cleaned/train": "alpaca_cleaned",
    "hf:mosaicml/dolly_hhrlhf/train": "dolly_hhrlhf",
}
# base models of the paper -> hub ids
LANGUAGE_MODELS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "gemma2-9b": "google/gemma-2-9b",
}


def images_beside_paper(
    results: Sequence[Result], train: str, test: str, num_classes: int, encoder: str, weights: str
) -> str:
    """Returns Markdown: test accuracies beside the paper's, "" for other data sets and encoders.

    Args:
      results: Rows of `results.csv`; those of `flexrand` select by DLC.
      train, test: Sources that the runs were trained and tested on.
      num_classes: Classes of the test set; a source of the right name with another number is not
        the paper's data set.
      encoder: Name of the network; the paper's numbers are of `resnet18`.
      weights: Its weights, for the text.
    """
    known = next((one for one in _DATA_SETS if one.is_this(train, test, num_classes)), None)
    ours: dict[tuple[float, str, str], list[float]] = {}
    for result in results:
        if result.method not in _REFERENCES:
            key = (result.keep_fraction, result.method, result.label)
            ours.setdefault(key, []).append(result.test_accuracy)
    if known is None or encoder.removeprefix("timm:") != "resnet18" or not ours:
        return ""
    theirs = {
        (row.keep_fraction, _OURS.get(row.method, row.method)): row
        for row in read_paper(PaperAccuracy)
        if row.dataset == known.name
    }
    asked, run = {keep for keep, *_ in ours}, {key[:2] for key in ours}
    ours |= {(*key, key[1]): [] for key in theirs if key[0] in asked and key not in run}
    order = {method: number for number, (_, method) in enumerate(theirs)}
    lines = []
    for key in sorted(ours, key=lambda key: (-key[0], order.get(key[1], math.inf), key[2])):
        keep_fraction, method, label = key
        row = theirs.get((keep_fraction, method))
        accuracy, std = (math.nan, math.nan) if row is None else (row.accuracy, row.std)
        lines.append((f"{keep_fraction:g}", label, *_compared(ours[key], accuracy), _shown(std)))
    header = ("keep", "method", *_COMPARED, "paper's std")
    own_split = "" if known.is_split_known else " Its split of this data set is not published."
    return (
        f"Beside the paper, {known.name}: test accuracy by the fraction kept, means over seeds. "
        f"Ours: {encoder}, {markdown_text(weights)}. The paper's: ResNet-18, fully pre-trained, "
        "three seeds; FlexRand at the split that was best on validation data, another one for "
        "every keep fraction; baselines as in its authors' code, in places not the published "
        f"definitions (ours with selection.variant=paper).{own_split}\n\n{markdown(header, lines)}"
    )


def mmlu_beside_paper(
    measured: Sequence[tuple[Result, Mapping[str, float]]], train: str, weights: str
) -> str:
    """Returns Markdown: MMLU by group beside the paper's, "" for other instructions and models.

    Args:
      measured: Rows of `results.csv`, and accuracies in percent by group of MMLU; those of
        `flexrand` select by DLC. The paper's numbers are of half of the instructions.
      train: Source of the instructions.
      weights: Hub id of the model.
    """
    model = next((name for name, hub_id in LANGUAGE_MODELS.items() if hub_id == weights), None)
    names = (_INSTRUCTIONS.get(train), model)
    theirs = [row for row in read_paper(PaperMmlu) if (row.dataset, row.model) == names]
    ours: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for result, groups in measured:
        if result.keep_fraction == _MMLU_KEEP_FRACTION:
            ours.setdefault((result.method, result.label), []).append(groups)
    if not theirs or not ours:
        return ""
    lines = []
    for column in ("random", "dlc_flexrand"):
        method = _OURS.get(column, column)
        for label in [label for own, label in ours if own == method] or [method]:
            for row in theirs:
                found = [groups[row.mmlu_group] for groups in ours.get((method, label), ())]
                lines.append((label, row.mmlu_group, *_compared(found, getattr(row, column))))
    return (
        f"Beside the paper, {names[0]} and {names[1]}: MMLU after LoRA on half of the "
        f"instructions, means over seeds.\n\n{markdown(('method', 'MMLU', *_COMPARED), lines)}"
    )


def _compared(ours: Sequence[float], paper: float) -> tuple[str, str, str, str]:
    """Returns how many, their mean, the paper's number and the difference, as text."""
    mean = float(np.mean(ours)) if ours else math.nan
    difference = mean - paper
    signed = "" if math.isnan(difference) else f"{difference:+.2f}"
    return str(len(ours) or ""), _shown(mean), _shown(paper), signed


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
