"""What the selected methods use, read from the work directory, and selections made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax.config import Config
from dlc_jax.scores import SCORES
from dlc_jax.selection import AUTO, INPUTS, SELECTORS, Candidates, Cell
from dlc_jax.tasks.measurements import read_input, record_with
from dlc_jax.types import Selection, Tuning
from dlc_jax.workspace import records
from dlc_jax.workspace.artefacts import ScoredSamples
from dlc_jax.workspace.keys import json_hash


class SelectionInputs:
    """Scores, inputs of selectors and tuning of the samples of a work directory.

    Args:
      config: Says which methods, and how they select.
      workdir: Where `scores/` is.
      samples: Ids, labels and scores.

    Attributes:
      input: Returns one of `INPUTS`, [n, d]; raises ValueError if it was not measured.
      tuning: What `auto` stands for; None until it is known.
    """

    def __init__(self, config: Config, workdir: Path, samples: ScoredSamples):
        self.samples, self.mode = samples, config.mode
        self.tuning: Tuning | None = None
        self.input: Callable[[str], np.ndarray] = functools.cache(
            lambda name: read_input(workdir, name, samples)
        )
        self._config, self._workdir = config, workdir
        self._fingerprints: dict[str, str] = {}
        self._candidates: dict[tuple[str, ...], Candidates] = {}

    def _inputs_of(self, method: str) -> list[str]:
        """Returns the names of the inputs that a method, or `auto`, uses."""
        if method == AUTO:
            return ["features"] if self._config.tuning.needs_features else []
        return [name for name in INPUTS if name == SELECTORS[method].needs]

    def how(self, cell: Cell) -> dict[str, Any]:
        """Returns what decides the selection of a cell besides the scores that it uses."""
        how = self._config.selection.how(cell.method)
        if AUTO in (cell.method, cell.split):
            how["tuning"] = self._tuned_from
        return how

    @functools.cached_property
    def _tuned_from(self) -> str:
        """Hash of what decides what `auto` stands for, besides the keep fraction."""
        tuning = records.read(self._workdir, "tune")
        key = {} if tuning is None else tuning.key
        found = {name: value for name, value in key.items() if name != "keep_fractions"}
        return json_hash([self._config.decides_auto, found])

    def earlier_seconds(self, cell: Cell) -> float:
        """Returns the time that the selection of a cell waits for: of measuring and tuning."""
        method, _, split, _ = cell
        if AUTO in (method, split):
            names = {"tune", *self._inputs_of(AUTO)}
        else:
            names = {record_with(name) for name in self._inputs_of(method)}
        if self._by_scores(method):
            of = SCORES[self._config.selection.score_name(method)].of
            names.add("training" if of == "training" else "score")
        return sum(self._seconds.get(name, 0.0) for name in names)

    @functools.cached_property
    def _seconds(self) -> dict[str, float]:
        return {record.step: record.seconds for record in records.matching(self._workdir, "*")}

    def _by_scores(self, method: str) -> bool:
        """Whether scores decide what a method selects, or how much of each class."""
        by_difficulty = self._config.selection.allocation != "proportional"
        return method == AUTO or SELECTORS[method].needs == "scores" or by_difficulty

    def fingerprint(self, method: str) -> str:
        """SHA-256 over the samples and what a selection of this method uses."""
        if method not in self._fingerprints:
            name = self._config.selection.score_of(method) if self._by_scores(method) else "dlc"
            arrays = {name: self.samples.score(name)}
            arrays |= {name: self.input(name) for name in self._inputs_of(method)}
            self._fingerprints[method] = self.samples.fingerprint_of(arrays)
        return self._fingerprints[method]

    def select(self, cell: Cell) -> Selection:
        """Selects a cell."""
        selection, samples = self._config.selection, self.samples
        score, *names = by = (selection.score_of(cell.method), *self._inputs_of(cell.method))
        if by not in self._candidates:
            inputs = {name: self.input(name) for name in names}
            self._candidates[by] = Candidates(
                samples.score(score), samples.labels, ids=samples.ids, inputs=inputs
            )
        return self._candidates[by].select(
            **cell._asdict(),
            tuning=self.tuning if AUTO in (cell.method, cell.split) else None,
            mode=self.mode,
            rules=selection.rules_of(cell.method),
        )
