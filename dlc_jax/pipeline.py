"""The stages in order; what is on disk and still valid is not done again."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

import dlc_jax
from dlc_jax import artefacts, checks, provenance, reports, selection_files
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.config import Config
from dlc_jax.datasets import load_dataset
from dlc_jax.encoders import Encoder, load_encoder
from dlc_jax.export_stage import run_exports
from dlc_jax.probes import probe
from dlc_jax.scores import SCORES, score
from dlc_jax.selection import select
from dlc_jax.sweep import run_sweep, what_is_finished
from dlc_jax.training import class_ids_by_name
from dlc_jax.types import Dataset, ProbeLosses, Selection

Load: TypeAlias = Callable[[str], Dataset]  # by source
# Settings that change speed and memory, but not what comes out.
_SPEED_ONLY = ("batch_size", "chunk")
_SHORT_PATH = 0.5  # sparsity; both schedules of 50 probes go beyond it


def run(config: Config, workdir: Path, echo: Callable[[str], None] = print) -> None:
    """Runs `config.stages` and leaves their artefacts in the work directory.

    Args:
      config: Checked configuration.
      workdir: Made if need be.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: anything wrong with the work directory, data, encoder or configuration.
    """
    artefacts.prepare_workdir(workdir)
    load = functools.cache(load_dataset)  # stages share data sets, and their fingerprints
    if "finetune" in config.stages:  # a mistake there should not cost a scoring pass first
        class_ids_by_name(load(_test_source(config)), load(config.dataset.train))
    resolved = _score(config, workdir, load, echo) if "score" in config.stages else config
    failures = []
    if config.stages != ("report",):
        failures = _use_scores(config, resolved.to_dict(), workdir, load, echo)
    if "report" in config.stages:
        _report(config, workdir, echo)
    if failures:
        raise checks.InputError(f"{len(failures)} runs failed: {'; '.join(failures)}")


def _use_scores(
    config: Config,
    settings: dict[str, Any],
    workdir: Path,
    load: Load,
    echo: Callable[[str], None],
) -> list[str]:
    """Runs what starts from scores on disk; returns a line for every run that failed.

    What scoring resolved is for `config.json`: another encoder may be fine-tuned than was scored.
    """
    _check_scores_are_whole(workdir)
    samples = artefacts.read_scores(workdir)
    if "score" not in config.stages:  # the rest of the file still describes the scores
        mine = {key: settings[key] for key in ("mode", "stages", "selection", "export", "finetune")}
        found = artefacts.read_json(workdir / artefacts.CONFIG)
        if "finetune" in config.stages and "dataset" in found:
            mine["dataset"] = found["dataset"] | {"test": config.dataset.test}
        settings |= found | mine
    artefacts.write_json(workdir / artefacts.CONFIG, settings)
    shown = None
    if "select" in config.stages:
        shown = _select(config, workdir, samples, echo)
    if "score" in config.stages or "select" in config.stages:
        _summarise(workdir, samples, shown, echo)
    if "export" in config.stages:
        run_exports(config, workdir, samples, load(config.dataset.train), echo)
    return _finetune(config, workdir, samples, load, echo) if "finetune" in config.stages else []


def _score(config: Config, workdir: Path, load: Load, echo: Callable[[str], None]) -> Config:
    """Returns the configuration with what the encoder decides filled in."""
    start = time.perf_counter()
    settings = config.encoder
    dataset = load(config.dataset.train)
    encoder = _load_encoder(config).for_mode(config.mode)
    encoder.check_image_size(settings.image_size)
    decided = dataclasses.replace(
        settings, pooling=encoder.pooling, mean=encoder.mean, std=encoder.std
    )
    resolved = dataclasses.replace(config, encoder=decided)
    inputs = _score_inputs(config, dataset, encoder)
    if provenance.is_done(workdir, "score", inputs):
        echo("score: unchanged, not run again")
        return resolved
    echo(
        f"score: {len(dataset)} samples of {dataset.num_classes} classes, "
        f"{encoder.name} on {jax.default_backend()}"
    )
    if config.cache.max_gib and not config.cache.takes(len(dataset), settings.image_size):
        echo(
            f"score: note: decoded images are more than cache.max_gib={config.cache.max_gib:g}; "
            "they are decoded twice, and not kept"
        )
    probes = probe(
        encoder,
        dataset,
        image_size=settings.image_size,
        on_corrupt=config.dataset.on_corrupt,
        cache=config.cache,
        folder=workdir / artefacts.SHARDS,
        seed=config.seed,
        mode=config.mode,
        progress=True,
        **config.to_dict()["probe"],
    )
    echo(f"score: {len(probes.sparsity)} probes up to sparsity {probes.sparsity[-1]:.2f}")
    if config.probe.placement == "grid" and probes.sparsity[-1] < _SHORT_PATH:
        echo(
            "score: note: the path stops early, where losses are nearly the unmasked network's; "
            "--config.probe.placement=midpoint spreads the probes over all of it"
        )
    _write_scores(workdir, dataset, probes)
    paths = [Path(artefacts.LOSSES), Path(artefacts.SCORES), Path(artefacts.PICTURE)]
    facts = {
        "dataset": _dataset_facts(dataset, probes),
        "encoder": _encoder_facts(encoder, settings.weights),
    }
    made_with = {key: resolved.to_dict()[key] for key in ("mode", "seed", "encoder", "probe")}
    seconds = time.perf_counter() - start
    provenance.record(workdir, "score", inputs, paths, seconds, facts, made_with)
    shutil.rmtree(workdir / artefacts.SHARDS, ignore_errors=True)  # finished
    return resolved


def _test_source(config: Config) -> str:
    assert config.dataset.test is not None  # checked with the configuration
    return config.dataset.test


def _load_encoder(config: Config) -> Encoder:
    settings = config.encoder
    return load_encoder(
        settings.name,
        settings.weights,
        pooling=settings.pooling,
        mean=settings.mean,
        std=settings.std,
    )


def _check_scores_are_whole(workdir: Path) -> None:
    """A run killed between two files of `scores/` leaves files that do not belong together."""
    record = provenance.stage_record(workdir, "score")
    if record is not None and not artefacts.are_intact(workdir, record["outputs"]):
        raise checks.InputError(
            f"{workdir}/scores: not as the stage 'score' left it (changed, or a run was stopped "
            "while it wrote); run that stage again."
        )


def _write_scores(workdir: Path, dataset: Dataset, probes: ProbeLosses) -> None:
    scores = {name: score(probes, method=name) for name in SCORES}
    artefacts.write_losses(
        workdir,
        losses=probes.losses,
        sparsity=probes.sparsity,
        labels=probes.labels,
        ids=probes.ids,
    )
    samples = ScoredSamples(probes.ids, probes.labels, probes.class_names, scores)
    artefacts.write_scores(workdir, samples)
    positions = np.flatnonzero(np.isin(dataset.ids, list(probes.skipped), invert=True))
    picture = reports.easiest_hardest(dataset, positions, scores["dlc"])
    with artefacts.atomic(workdir / artefacts.PICTURE) as file:
        picture.save(file, "PNG", optimize=True)


def _select(
    config: Config, workdir: Path, samples: ScoredSamples, echo: Callable[[str], None]
) -> Selection:
    """Writes every cell; returns the one the summary shows, the middle one of the first method."""
    start = time.perf_counter()
    cells = config.selection.cells()
    least = config.selection.min_per_class
    facts = {"scores": samples.fingerprint, "mode": config.mode, "cells": cells, "least": least}
    inputs = artefacts.json_hash({"version": dlc_jax.__version__, **facts})
    of_first = [cell for cell in cells if cell[0] == config.selection.methods[0]]
    shown = of_first[len(of_first) // 2]
    scored = (
        (provenance.stage_record(workdir, "score") or {})
        .get("settings", {})
        .get("mode", config.mode)
    )
    if scored != config.mode:
        echo(f"select: note: in mode {config.mode!r}, from scores of mode {scored!r}")
    num_aside = selection_files.set_superseded_aside(workdir, samples.fingerprint, config.mode)
    if num_aside:
        echo(f"select: {num_aside} selections of other scores or mode moved to superseded/")
    done = provenance.is_done(workdir, "select", inputs)
    paths, selections = [], {}
    bare: set[float] = set()  # keep fractions already noted
    for cell in [shown] if done else cells:
        method, keep_fraction, split, seed = cell
        selections[cell] = select(
            samples.scores["dlc"],
            samples.labels,
            method=method,
            keep_fraction=keep_fraction,
            split=split,
            seed=seed,
            min_per_class=least,
            mode=config.mode,
        )
        if not done:
            paths += selection_files.write_selection(workdir, selections[cell], samples)
            num_lost = int((selections[cell].num_kept_per_class == 0).sum())
            if num_lost and keep_fraction not in bare:
                bare.add(keep_fraction)
                echo(
                    f"select: note: keep fraction {keep_fraction:g} keeps nothing of {num_lost} of "
                    f"{len(samples.class_names)} classes (budgets are rounded in every class; "
                    "selection.min_per_class=1 keeps one)"
                )
    if done:
        echo("select: unchanged, not run again")
    else:
        made_with = {"mode": config.mode, "selection": config.to_dict()["selection"]}
        seconds = time.perf_counter() - start
        provenance.record(workdir, "select", inputs, paths, seconds, {}, made_with)
        echo(f"select: {len(cells)} selections written")
    return selections[shown]


def _finetune(
    config: Config,
    workdir: Path,
    samples: ScoredSamples,
    load: Load,
    echo: Callable[[str], None],
) -> list[str]:
    """Returns a line for every run that failed."""
    encoder = _load_encoder(config)
    dataset, test = load(config.dataset.train), load(_test_source(config))
    before = artefacts.read_bytes(workdir / artefacts.RESULTS)
    try:
        end = run_sweep(config, workdir, samples, encoder, dataset, test, echo)
    finally:
        if artefacts.read_bytes(workdir / artefacts.RESULTS) != before:
            shutil.rmtree(workdir / artefacts.REPORT, ignore_errors=True)  # it tells of other runs
    settings = config.to_dict()
    made_with = {key: settings[key] for key in ("mode", "dataset", "encoder", "finetune")}
    made_with |= {"encoder_fingerprint": encoder.for_mode(config.mode).fingerprint}
    made_with |= {"test_fingerprint": test.fingerprint}
    inputs = artefacts.json_hash([made_with, settings["selection"], samples.fingerprint])
    paths = [Path(artefacts.RESULTS)]
    provenance.record(workdir, "finetune", inputs, paths, end.seconds, {}, made_with)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    return end.failures


def _report(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Prints and saves what `results.csv` says."""
    rows = reports.summarise(reports.read_results(workdir / artefacts.RESULTS))
    table, said = reports.results_table(rows), what_is_finished(config, workdir)
    echo(f"\n{said}\n\n{table}\n")
    with artefacts.atomic(workdir / artefacts.REPORT / "results.md", "w") as file:
        file.write(f"{said}\n\n{table}\n")
    if all(row.gap is None for row in rows):
        echo("report: no figure: there is no gap to random; add random to selection.methods")
        return
    trained = (provenance.stage_record(workdir, "finetune") or {}).get("settings", config.to_dict())
    title = f"{trained['dataset']['train']}, {trained['encoder']['name']}"
    figure = reports.gap_to_random(rows, title)
    for kind in ("png", "svg"):
        with artefacts.atomic(workdir / artefacts.REPORT / f"gap_to_random.{kind}") as file:
            figure.savefig(file, format=kind, dpi=150)
    echo(f"files: {workdir}/{artefacts.REPORT}/ (results.md, gap_to_random.png, .svg)")


def _summarise(
    workdir: Path, samples: ScoredSamples, shown: Selection | None, echo: Callable[[str], None]
) -> None:
    indices = None
    echo("")
    if shown is not None:
        indices = shown.indices
        cell = selection_files.cell_name(shown.keep_fraction, shown.split, shown.seed)
        echo(f"kept as in selections/{shown.method}/{cell}:")
    echo(
        reports.class_table(
            samples.class_names, samples.labels, samples.scores["dlc"], samples.ids, indices
        )
    )
    echo("")
    sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
    singles = [samples.class_names[j] for j in np.flatnonzero(sizes == 1)]
    if singles:
        echo(f"classes of one sample (in mode 'default' always kept): {', '.join(singles)}")
    known = artefacts.read_json(workdir / artefacts.PROVENANCE)
    skipped = known.get("dataset", {}).get("skipped", {})
    if skipped:
        echo(f"unreadable samples left out: {len(skipped)}, listed in {artefacts.PROVENANCE}")
    stages = known.get("stages", {})
    seconds = {name: stages[name]["seconds"] for name in ("score", "select") if name in stages}
    echo(
        "seconds, when last run: "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    )
    echo(f"files: {workdir}/ ({artefacts.SCORES}, {artefacts.PICTURE}, selections/)")


def _score_inputs(config: Config, dataset: Dataset, encoder: Encoder) -> str:
    settings = config.to_dict()
    probe_settings = {k: v for k, v in settings["probe"].items() if k not in _SPEED_ONLY}
    return artefacts.json_hash(
        {
            "version": dlc_jax.__version__,
            "mode": config.mode,
            "seed": config.seed,
            "probe": probe_settings,
            "image_size": config.encoder.image_size,
            "on_corrupt": config.dataset.on_corrupt,
            "dataset": dataset.fingerprint,
            "encoder": encoder.fingerprint,
        }
    )


def _dataset_facts(dataset: Dataset, probes: ProbeLosses) -> dict[str, Any]:
    sizes = np.bincount(probes.labels, minlength=dataset.num_classes)
    return {
        "source": dataset.name,
        "fingerprint": dataset.fingerprint,
        "num_samples": len(dataset),
        "num_classes": dataset.num_classes,
        "skipped": probes.skipped,
        "label_table": dataset.label_table,
        "single_sample_classes": [dataset.class_names[j] for j in np.flatnonzero(sizes == 1)],
    }


def _encoder_facts(encoder: Encoder, weights: str) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "weights": weights,
        "fingerprint": encoder.fingerprint,
        "mean": encoder.mean,
        "std": encoder.std,
        "normalisation": encoder.normalisation,
        "pooling": encoder.pooling,
    }
