"""What the selected methods use, read from the work directory, and selections made of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax.config import Config
from dlc_jax.scores import SCORES
from dlc_jax.selection import AUTO, SELECTORS, Candidates, Cell
from dlc_jax.stages.measurements import check_is_of_these_scores
from dlc_jax.training.images import read_record
from dlc_jax.types import Selection, Tuning
from dlc_jax.workspace import artefacts, records
from dlc_jax.workspace.artefacts import ScoredSamples
from dlc_jax.workspace.keys import json_hash

# Parts of the stage `score`, by what a method needs.
_STAGES_FOR = {"features": {"features"}, "probabilities": {"training"}}


class SelectionInputs:
    """Scores, features, probabilities and tuning of the samples of a work directory.

    Args:
      config: Says which methods, and how they select.
      workdir: Where `scores/` is.
      samples: Ids, labels and scores.
      tuning: What `auto` stands for; None where nothing is selected by it.
    """

    def __init__(
        self, config: Config, workdir: Path, samples: ScoredSamples, tuning: Tuning | None = None
    ):
        self.samples, self.mode = samples, config.mode
        self._config, self._workdir, self._tuning = config, workdir, tuning
        self._fingerprints: dict[str, str] = {}
        self._candidates: dict[tuple[str, bool, bool], Candidates] = {}

    @functools.cached_property
    def features(self) -> np.ndarray:
        """[n, d]; raises ValueError if they were not measured."""
        path, name = artefacts.FEATURES, "features"
        check_is_of_these_scores(self._workdir, name)
        return artefacts.read_array(self._workdir, path, name, self.samples)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """[n, c] after training on everything; raises ValueError if that was not recorded."""
        check_is_of_these_scores(self._workdir, "training")
        return read_record(self._workdir / artefacts.TRAINING, self.samples.ids).probabilities

    def how(self, cell: Cell) -> dict[str, Any]:
        """Returns what decides the selection of a cell besides the scores that it uses."""
        method, _, split, _ = cell
        how = self._config.selection.how(method)
        if AUTO in (method, split):
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
        return sum(self._seconds.get(name, 0.0) for name in self._waits_for(cell))

    @functools.cached_property
    def _seconds(self) -> dict[str, float]:
        return {record.step: record.seconds for record in records.matching(self._workdir, "*")}

    def _waits_for(self, cell: Cell) -> set[str]:
        method, _, split, _ = cell
        selection, scored = self._config.selection, set()
        if method == AUTO or SELECTORS[method].needs == "scores" or self._by_difficulty:
            of = SCORES[selection.score_name(method)].of
            scored = {"training" if of == "training" else "score"}
        if AUTO in (method, split):
            return (
                scored | {"tune"} | ({"features"} if self._config.tuning.needs_features else set())
            )
        return scored | _STAGES_FOR.get(SELECTORS[method].needs, set())

    @property
    def _by_difficulty(self) -> bool:
        return self._config.selection.allocation != "proportional"

    def fingerprint(self, method: str) -> str:
        """SHA-256 over the samples and what a selection of this method uses."""
        if method not in self._fingerprints:
            self._fingerprints[method] = self._fingerprint(method)
        return self._fingerprints[method]

    def _fingerprint(self, method: str) -> str:
        needs = "scores"
        if method != AUTO:
            needs = SELECTORS[method].needs
        name = self._config.selection.score_of(method)
        arrays = {"dlc": self.samples.scores["dlc"]}  # unless other scores are named
        if needs == "scores" or self._by_difficulty:
            arrays = {name: self.samples.score(name)}
        if needs == "features" or (method == AUTO and self._config.tuning.needs_features):
            arrays |= {"features": self.features}
        if needs == "probabilities":
            arrays |= {needs: self.probabilities}
        return self.samples.fingerprint_of(arrays)

    def select(self, cell: Cell) -> Selection:
        """Selects a cell."""
        method, keep_fraction, split, seed = cell
        tuned = AUTO in (method, split)
        by_features = (
            SELECTORS[method].needs == "features"
            if method != AUTO
            else (self._config.tuning.needs_features)
        )
        by_probabilities = method != AUTO and SELECTORS[method].needs == "probabilities"
        selection = self._config.selection
        by = (selection.score_of(method), by_features, by_probabilities)
        if by not in self._candidates:
            self._candidates[by] = Candidates(
                self.samples.score(by[0]),
                self.samples.labels,
                ids=self.samples.ids,
                features=self.features if by_features else None,
                probabilities=self.probabilities if by_probabilities else None,
            )
        return self._candidates[by].select(
            method=method,
            keep_fraction=keep_fraction,
            split=split,
            seed=seed,
            tuning=self._tuning if tuned else None,
            mode=self._config.mode,
            rules=selection.rules_of(method),
        )
