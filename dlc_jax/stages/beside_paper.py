"""Whether a run is of one of the paper's data sets, by its own records; if so, both numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dlc_jax.reports.beside_paper import images_beside_paper, mmlu_beside_paper
from dlc_jax.reports.results import Result
from dlc_jax.selection import Cell, Rules
from dlc_jax.stages.sweep_results import read_evaluation
from dlc_jax.workspace import artefacts, records

# What the stage `finetune` records; kinds of data that the paper does not have may lack some of it.
_SETTINGS = {
    "dataset": {"train": str, "test?": (str, None)},
    "encoder": {"name?": str, "weights?": str},
}
_FACTS = {"test_dataset?": {"num_classes": int}}
_NUM_MMLU_QUESTIONS = 14_042  # of all subjects; accuracies on fewer are not the paper's


def beside_paper(workdir: Path, results: Sequence[Result]) -> str:
    """Returns Markdown: results beside the paper's; "" where there is nothing to compare.

    Args:
      workdir: Work directory, whose records decide what the runs are of.
      results: Rows of its `results.csv`.
    """
    trained = records.settings_of(workdir, "finetune", _SETTINGS)
    facts = records.settings_of(workdir, "finetune", _FACTS, "facts")
    if trained is None or facts is None:
        return ""
    train, test = trained["dataset"]["train"], trained["dataset"].get("test")
    name, weights = (trained["encoder"].get(key, "") for key in ("name", "weights"))
    otherwise = _selected_otherwise(workdir)
    comparable = [
        (result, Cell(*result[:4])) for result in results if Cell(*result[:4]).name not in otherwise
    ]
    if "test_dataset" in facts:
        return images_beside_paper(
            [result for result, _ in comparable],
            train=train,
            test=test or "",
            num_classes=facts["test_dataset"]["num_classes"],
            encoder=name,
            weights=weights,
        )
    measured = [(result, read_evaluation(workdir, cell)) for result, cell in comparable]
    whole = [
        (result, found["result"])
        for result, found in measured
        if found.get("num_questions") == _NUM_MMLU_QUESTIONS
    ]
    return mmlu_beside_paper(whole, train, weights)


_NOT_RULES = ("mode", "score", "variant", "tuning", "target", "second_encoder")


def _selected_otherwise(workdir: Path) -> set[str]:
    """Returns the names of the cells, by their records, whose rules or score the paper has not."""
    usual, found = dataclasses.asdict(Rules()), set()
    for record in records.matching(workdir, f"{artefacts.SELECTIONS}/*/*"):
        name = record.step.removeprefix(f"{artefacts.SELECTIONS}/")
        rules = {k: v for k, v in record.settings.items() if k not in _NOT_RULES}
        by_dlc = record.settings.get("score") == "dlc" or not name.startswith("flexrand/")
        if not by_dlc or any(usual.get(k) != v for k, v in rules.items()):
            found.add(name)
    return found
