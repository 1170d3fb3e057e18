"""What is measured of instructions: losses of responses under every probe, and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks, reports
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import Run, said_of
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.probes.responses import measure_responses, probe_responses
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.tasks.measurements import NOT_IN_LOSSES, write_certificate
from dlc_jax.types import ProbeLosses, ResponseLosses
from dlc_jax.workspace import Written, artefacts
from dlc_jax.workspace.artefacts import ScoredSamples
from dlc_jax.workspace.keys import json_hash

READABLE = "scores/easiest_hardest.md"


# Instructions that were not left out, their tokens, and what two passes over them give.
_Measured: TypeAlias = tuple[Instructions, Tokenised, ProbeLosses, ResponseLosses]


@dataclasses.dataclass(frozen=True, eq=False)
class ResponsesStep:
    """Losses of responses, all scores made of them, and a text of the extremes."""

    config: Config
    data: Instructions
    model: LanguageModel
    mesh: Mesh
    say: Callable[[str], None]

    name = stage = "score"
    kind = "response losses"
    files = (artefacts.LOSSES, artefacts.SCORES, READABLE)
    obsolete = (artefacts.UNFINISHED,)

    @property
    def key(self) -> dict[str, Any]:
        return self._how | {
            "data": self.data.fingerprint,
            "model": self.model.fingerprint,
            "tokenizer": self.model.tokenizer_fingerprint,
        }

    @property
    def settings(self) -> dict[str, Any]:
        return self._how | {"asked": self.config.asked}

    @property
    def _how(self) -> dict[str, Any]:
        config = self.config
        probes = {k: v for k, v in config.to_dict()["probe"].items() if k not in NOT_IN_LOSSES}
        return {
            "seed": config.seed,
            "probe": probes,
            "max_length": self._max_length,
            "on_corrupt": config.dataset.on_corrupt,
            "category": self._categories,
        }

    @property
    def _categories(self) -> str | None:
        """Hash of the classes that a column gives; ValueError where there is no such column."""
        column = self.config.dataset.category
        if column is None:
            return None
        labels, names = self.data.categories(column)
        return json_hash([column, labels.tolist(), names])

    @property
    def _max_length(self) -> int:
        return self.model.max_length(self.config.encoder.max_length)

    def compute(self, scratch: Path) -> _Measured:
        config, data, model, say = self.config, self.data, self.model, self.say
        say(f"score: {len(data)} instructions, {model.name} on {said_of(self.mesh)}")
        on_corrupt, max_length = config.dataset.on_corrupt, self._max_length
        tokens = tokenise(data, model.tokenizer, max_length, on_corrupt=on_corrupt)
        if num := int(tokens.truncated.sum()):
            say(f"score: note: {num} of {len(tokens)} are cut off at {max_length} tokens")
        if tokens.skipped:
            say(f"score: note: {len(tokens.skipped)} left out, their prompts alone are longer")
        kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
        run = Run(scratch, self.mesh, progress=True)
        how: dict[str, Any] = {"tokens_per_batch": config.probe.tokens_per_batch, "run": run}
        probes = probe_responses(model, tokens, path=config.probe, seed=config.seed, **how)
        responses = measure_responses(model, kept, max_length=max_length, tokens=tokens, **how)
        return kept, tokens, probes, responses

    def write(self, root: Path, found: _Measured) -> Written:
        config, (data, tokens, probes, responses) = self.config, found
        labels, class_names = probes.labels, probes.class_names
        if config.dataset.category is not None:
            labels, class_names = data.categories(config.dataset.category)
        scores = {"dlc": score(probes), **_other_scores(config, responses, self.say)}
        artefacts.write_losses(
            root, losses=probes.losses, sparsity=probes.sparsity, labels=labels, ids=probes.ids
        )
        artefacts.write_scores(root, ScoredSamples(probes.ids, labels, class_names, scores))
        with artefacts.atomic(root / READABLE, "w") as file:
            file.write(reports.easiest_hardest_text(data, scores["dlc"]))
        facts = {
            "dataset": {
                "source": self.data.name,
                "fingerprint": self.data.fingerprint,
                "num_samples": len(self.data),
                "num_truncated": int(tokens.truncated.sum()),
                "skipped": tokens.skipped,
            },
            "encoder": {"name": self.model.name, "fingerprint": self.model.fingerprint},
        }
        of_classes = dataclasses.replace(probes, labels=labels)
        certificate = write_certificate(root, of_classes, config.seed, self.say)
        return Written([*self.files, *certificate], facts)


def _other_scores(
    config: Config, responses: ResponseLosses, echo: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Returns every column that can be computed; one that is not selected by may be missing."""
    wanted = {config.selection.score_of(method) for method in config.selection.methods}
    scores = {}
    for name, method in SCORES.items():
        for variant in method.variants if method.of == "responses" else ():
            column = column_name(name, variant)
            try:
                scores[column] = score(responses, method=name, variant=variant)
            except checks.InputError as error:
                if column in wanted:
                    raise
                echo(f"score: note: no column {column}: {error}")
    return scores
