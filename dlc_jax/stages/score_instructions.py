"""The stage `score` of instructions: DLC, and scores that two passes give besides."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks, reports
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions, load_instructions
from dlc_jax.distributed import Run, Team, processes, said_of
from dlc_jax.distributed.processes import on_first, told_by_first
from dlc_jax.encoders.language_model import (
    LanguageModel,
    load_language_model,
    load_tokenizer,
)
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.probes.responses import measure_responses, probe_responses
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.stages.score import write_certificate
from dlc_jax.types import ProbeLosses, ResponseLosses
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts, provenance
from dlc_jax.workspace.artefacts import ScoredSamples

READABLE = "scores/easiest_hardest.md"


def load_configured_instructions(config: Config, source: str) -> Instructions:
    """Loads training or test data as the configuration says."""
    tokenizer = functools.partial(load_tokenizer, config.encoder.weights)
    return load_instructions(source, config.dataset.template, tokenizer=tokenizer)


def run_score_instructions(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Scores instructions by DLC, perplexity, IFD and length, unless that is done.

    Writes `scores/losses.npz`, `scores/scores.parquet` and `scores/easiest_hardest.md`.

    Raises:
      ValueError: anything wrong with data or model.
    """
    start = time.perf_counter()
    data = load_configured_instructions(config, config.dataset.train)
    mesh = config.mesh.make()
    model = load_language_model(
        config.encoder.weights, dtype=config.probe.dtype, mesh=Team.of(mesh).mesh
    )
    max_length = model.max_length(config.encoder.max_length)
    made_with = {
        "seed": config.seed,
        "probe": {k: v for k, v in config.to_dict()["probe"].items() if k != "tokens_per_batch"},
        "max_length": max_length,
        "on_corrupt": config.dataset.on_corrupt,
        "category": config.dataset.category,
    }
    inputs = artefacts.json_hash([__version__, made_with, data.fingerprint, model.fingerprint])
    if told_by_first(lambda: provenance.is_done(workdir, "score", inputs)):
        echo("score: unchanged, not run again")
        return
    if config.dataset.category is not None:
        data.categories(config.dataset.category)  # a mistake there should not cost a pass first
    echo(f"score: {len(data)} instructions, {model.name} on {said_of(mesh)}")
    tokens = tokenise(data, model.tokenizer, max_length, on_corrupt=config.dataset.on_corrupt)
    _tell_of_cuts(tokens, max_length, echo)
    kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
    probes, responses = _measured(config, workdir, model, kept, tokens, mesh)
    processes.wait_for_all()  # what comes goes when it is done, and all read it until here

    def keep() -> None:
        samples = _write(config, workdir, kept, probes, responses, echo)
        with artefacts.atomic(workdir / READABLE, "w") as file:
            file.write(reports.easiest_hardest_text(kept, samples.scores["dlc"]))
        facts = {
            "dataset": {
                "source": data.name,
                "fingerprint": data.fingerprint,
                "num_samples": len(data),
                "num_truncated": int(tokens.truncated.sum()),
                "skipped": tokens.skipped,
            },
            "encoder": {"name": model.name, "fingerprint": model.fingerprint},
        }
        paths = [Path(artefacts.LOSSES), Path(artefacts.SCORES), Path(READABLE)]
        of_classes = dataclasses.replace(probes, labels=samples.labels)
        paths += write_certificate(workdir, of_classes, config.seed, echo)
        seconds = time.perf_counter() - start
        settings = made_with | {"asked": config.asked}
        provenance.record(workdir, "score", inputs, paths, seconds, facts, settings)
        artefacts.remove(workdir / artefacts.SHARDS)  # finished

    on_first(keep)


def _measured(
    config: Config,
    workdir: Path,
    model: LanguageModel,
    data: Instructions,
    tokens: Tokenised,
    mesh: Mesh,
) -> tuple[ProbeLosses, ResponseLosses]:
    """Measures losses, in all processes."""
    how: dict[str, Any] = {
        "tokens_per_batch": config.probe.tokens_per_batch,
        "run": Run(workdir / artefacts.SHARDS, mesh, processes.is_first()),
    }
    probes = probe_responses(model, tokens, path=config.probe, seed=config.seed, **how)
    max_length = config.encoder.max_length
    return probes, measure_responses(model, data, max_length=max_length, tokens=tokens, **how)


def _write(
    config: Config,
    workdir: Path,
    data: Instructions,
    probes: ProbeLosses,
    responses: ResponseLosses,
    echo: Callable[[str], None],
) -> ScoredSamples:
    """Writes losses and scores."""
    labels, class_names = probes.labels, probes.class_names
    if config.dataset.category is not None:
        labels, class_names = data.categories(config.dataset.category)
    scores = {"dlc": score(probes), **_other_scores(config, responses, echo)}
    artefacts.write_losses(
        workdir, losses=probes.losses, sparsity=probes.sparsity, labels=labels, ids=probes.ids
    )
    samples = ScoredSamples(probes.ids, labels, class_names, scores)
    artefacts.write_scores(workdir, samples)
    return samples


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


def _tell_of_cuts(tokens: Tokenised, max_length: int, echo: Callable[[str], None]) -> None:
    if num := int(tokens.truncated.sum()):
        echo(f"score: note: {num} of {len(tokens)} are cut off at {max_length} tokens")
    if tokens.skipped:
        echo(f"score: note: {len(tokens.skipped)} left out, their prompts alone are longer")
