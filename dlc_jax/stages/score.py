"""The stage `score`: DLC of every sample, and whatever else the selected methods need."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dlc_jax import checks, reports
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.distributed import Run, processes, said_of
from dlc_jax.distributed.processes import on_first, told_by_first
from dlc_jax.encoders import Encoder, load_encoder
from dlc_jax.masking import AUTO
from dlc_jax.probes import certify, features, probe
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.stages.agreement import agree
from dlc_jax.training.folder import RunFolder
from dlc_jax.training.images import Recorder
from dlc_jax.types import Dataset, ProbeLosses
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts, provenance
from dlc_jax.workspace.artefacts import ScoredSamples

Load: TypeAlias = Callable[[str], Dataset]  # by source
# Settings that change speed and memory, but not what comes out.
NOT_IN_LOSSES = ("batch_size", "chunk", "tokens_per_batch")
_MEASURED = (artefacts.LOSSES, artefacts.PICTURE)  # what scores.parquet can be made of
_SHORT_PATH = 0.5  # sparsity; both schedules of 50 probes go beyond it


def run_score(config: Config, workdir: Path, load: Load, echo: Callable[[str], None]) -> Config:
    """Scores what is not scored yet.

    Args:
      config: Checked configuration.
      workdir: Where `scores/` goes.
      load: Loads a data set by its source.
      echo: Takes each line meant for the user.
    Returns:
      The configuration with what the encoder decides filled in.
    Raises:
      ValueError: anything wrong with data, encoder or training.
    """
    settings = config.encoder
    dataset = load(config.dataset.train)
    encoder = load_configured(config, echo)
    resolved_encoder = encoder.for_mode(config.mode)
    agree({f"encoder.weights {settings.weights}": resolved_encoder.fingerprint})
    resolved_encoder.check_image_size(settings.image_size)
    decided = dataclasses.replace(
        settings,
        pooling=resolved_encoder.pooling,
        mean=resolved_encoder.mean,
        std=resolved_encoder.std,
    )
    resolved = dataclasses.replace(config, encoder=decided)
    made_of = {
        "dataset": dataset.fingerprint,
        "encoder": resolved_encoder.fingerprint,
        "image_size": settings.image_size,
        "mode": config.mode,
        "on_corrupt": config.dataset.on_corrupt,
    }
    _measure_dlc(resolved, workdir, dataset, resolved_encoder, made_of, config.asked, echo)
    if config.need.features:
        _measure_features(config, workdir, dataset, resolved_encoder, made_of, echo)
    if config.need.training:
        _record(config, workdir, dataset, encoder, made_of, echo)
    return resolved


def load_configured(config: Config, echo: Callable[[str], None] | None = None) -> Encoder:
    """Returns the encoder that the configuration names, before `mode` decides anything."""
    settings = config.encoder
    encoder = load_encoder(
        settings.name,
        settings.weights,
        pooling=settings.pooling,
        mean=settings.mean,
        std=settings.std,
    )
    if encoder.prefix and echo is not None:
        echo(
            f"note: every name in {visible(settings.weights)} begins with "
            f"{visible(encoder.prefix)!r}, which is left out"
        )
    return encoder


def check_scores_are_whole(workdir: Path) -> None:
    """A run killed between two files of `scores/` leaves files that do not belong together."""
    ran = provenance.stage_record(workdir, "score") is not None
    if ran and not provenance.is_intact(workdir, "score"):
        raise checks.InputError(
            f"{workdir}/scores: not as the stage 'score' left it (changed, or a run was stopped "
            "while it wrote); run that stage again."
        )


def _measure_dlc(
    config: Config,
    workdir: Path,
    dataset: Dataset,
    encoder: Encoder,
    made_of: dict[str, Any],
    asked: dict[str, Any],
    echo: Callable[[str], None],
) -> None:
    start = time.perf_counter()
    inputs = _dlc_inputs(config, made_of)
    if told_by_first(
        lambda: provenance.is_done(workdir, "score", inputs) or _remade(workdir, inputs, dataset)
    ):
        echo("score: unchanged, not run again")
        return
    mesh = config.mesh.make(of_cores=True)
    echo(
        f"score: {len(dataset)} samples of {dataset.num_classes} classes, "
        f"{encoder.name} on {said_of(mesh)}"
    )
    _note_streaming(config, dataset, echo)
    probes = probe(
        encoder,
        config.images(dataset),
        mode=config.mode,
        seed=config.seed,
        path=config.probe,
        compute=config.probe,
        run=Run(workdir / artefacts.SHARDS, mesh, processes.is_first()),
    )
    processes.wait_for_all()  # what comes goes when it is done, and all read it until here
    dataset.mid_grey.update(*processes.everyones(sorted(dataset.mid_grey)))
    if dataset.mid_grey:
        echo(mid_grey_note("score", sorted(dataset.mid_grey)))
    _say_path(config, probes, echo)

    def keep() -> None:
        _write_dlc(workdir, dataset, probes)
        paths = [Path(artefacts.LOSSES), Path(artefacts.SCORES), Path(artefacts.PICTURE)]
        paths += write_certificate(workdir, probes, config.seed, echo)
        facts = {
            "dataset": _scored_facts(dataset, probes),
            "encoder": _encoder_facts(encoder, config.encoder.weights),
        }
        made_with = {key: config.to_dict()[key] for key in ("mode", "seed", "encoder", "probe")}
        made_with |= {"made_of": made_of, "asked": asked}
        seconds = time.perf_counter() - start
        provenance.record(workdir, "score", inputs, paths, seconds, facts, made_with)
        artefacts.remove(workdir / artefacts.SHARDS)  # finished

    on_first(keep)


def _note_streaming(config: Config, dataset: Dataset, echo: Callable[[str], None]) -> None:
    if config.cache.max_gib and not config.cache.takes(len(dataset), config.encoder.image_size):
        echo(
            f"score: note: decoded images are more than cache.max_gib={config.cache.max_gib:g}; "
            "they are decoded twice, and not kept"
        )


def _say_path(config: Config, probes: ProbeLosses, echo: Callable[[str], None]) -> None:
    echo(f"score: {len(probes.sparsity)} probes up to sparsity {probes.sparsity[-1]:.2f}")
    is_grid = config.probe.placement == "grid" and config.probe.num_probes != AUTO
    if is_grid and probes.sparsity[-1] < _SHORT_PATH:
        echo(
            "score: note: the path stops early, where losses are nearly the unmasked network's; "
            "--config.probe.placement=midpoint spreads the probes over all of it"
        )


def write_certificate(
    workdir: Path, probes: ProbeLosses, seed: int, echo: Callable[[str], None]
) -> list[Path]:
    """Prints and writes how far the ranking can be trusted; returns the files written."""
    if len(probes.losses) < 2:
        echo("score: note: one probe, whose ranking cannot be compared with that of more")
        return []
    found = certify(probes, seed=seed)
    echo(f"score: {found}")
    artefacts.write_json(workdir / artefacts.CERTIFICATE, found.to_dict())
    return [Path(artefacts.CERTIFICATE)]


def _remade(workdir: Path, inputs: str, dataset: Dataset) -> bool:
    """Makes the table anew of losses of these inputs; False if they are not there.

    A run killed while it added columns leaves a table that nobody vouches for.
    """
    record = provenance.stage_record(workdir, "score")
    if record is None or record["inputs"] != inputs:
        return False
    others = {name: sha for name, sha in record["outputs"].items() if name != artefacts.SCORES}
    is_recorded = len(others) < len(record["outputs"])
    if not is_recorded or not artefacts.are_intact(workdir, others, map(Path, _MEASURED)):
        return False
    found = artefacts.read_losses(workdir)
    scores = {"dlc": score(found["losses"])}
    samples = ScoredSamples(found["ids"], found["labels"], dataset.class_names, scores)
    artefacts.write_scores(workdir, samples)
    provenance.refresh(workdir, "score")
    return True


def _write_dlc(workdir: Path, dataset: Dataset, probes: ProbeLosses) -> None:
    scores = {"dlc": score(probes)}
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


def _measure_features(
    config: Config,
    workdir: Path,
    dataset: Dataset,
    encoder: Encoder,
    made_of: dict[str, Any],
    echo: Callable[[str], None],
) -> None:
    start = time.perf_counter()
    made_with = {"dtype": config.probe.dtype, "made_of": made_of}
    inputs = artefacts.json_hash([__version__, made_with])
    if told_by_first(lambda: provenance.is_done(workdir, "features", inputs)):
        echo("features: unchanged, not measured again")
        return
    mesh = config.mesh.make(of_cores=True)
    found = features(
        encoder,
        config.images(dataset),
        mode=config.mode,
        compute=config.probe,
        run=Run(workdir / artefacts.SHARDS, mesh, processes.is_first()),
    )
    processes.wait_for_all()

    def keep() -> None:
        ids = artefacts.read_scores(workdir).ids
        with artefacts.atomic(workdir / artefacts.FEATURES) as file:
            np.savez(file, allow_pickle=False, features=found, ids=ids)
        seconds = time.perf_counter() - start
        paths = [Path(artefacts.FEATURES)]
        provenance.record(workdir, "features", inputs, paths, seconds, {}, made_with)
        artefacts.remove(workdir / artefacts.SHARDS)

    on_first(keep)
    echo(f"features: {found.shape[1]} of each sample")


def _record(
    config: Config,
    workdir: Path,
    dataset: Dataset,
    encoder: Encoder,
    made_of: dict[str, Any],
    echo: Callable[[str], None],
) -> None:
    """Trains on the whole set, unless that was done, and adds the columns of scores made of it."""
    folder = workdir / artefacts.TRAINING
    recorder = Recorder(
        encoder,
        config.images(dataset),
        config.finetune,
        config.record,
        seed=config.seed,
        conventions=config.conventions,
        run=Run(folder, config.mesh.make(), processes.is_first()),
    )
    on_first(lambda: _prepare_record(workdir, recorder, echo))
    record = recorder.run()

    def keep() -> None:
        assert record is not None  # the first process has it
        samples = artefacts.read_scores(workdir)
        if not np.array_equal(samples.ids, record.ids):
            raise checks.InputError(
                f"{folder}: records other samples than {artefacts.SCORES} has; run the stage "
                "'score' in another work directory."
            )
        made_with = {key: config.to_dict()[key] for key in ("mode", "seed", "finetune", "record")}
        made_with["made_of"] = made_of
        paths = [Path(artefacts.TRAINING) / "record.npz"]
        seconds = record.seconds
        provenance.record(workdir, "training", recorder.inputs, paths, seconds, {}, made_with)
        columns = {
            column_name(name, variant): score(record, method=name, variant=variant)
            for name, method in SCORES.items()
            if method.of == "training"
            for variant in method.variants
        }
        _write_columns(workdir, {"dlc": samples.scores["dlc"]} | columns)

    on_first(keep)


def _prepare_record(workdir: Path, recorder: Recorder, echo: Callable[[str], None]) -> None:
    """Sets a record of other settings aside, and prints what will be done."""
    folder, samples = workdir / artefacts.TRAINING, artefacts.read_scores(workdir)
    found = RunFolder(folder).facts().get("inputs", recorder.inputs)
    if found != recorder.inputs:
        aside = workdir / "superseded" / f"training-{found[:12]}"
        artefacts.remove(aside)
        provenance.forget(workdir, "training")
        _write_columns(workdir, {"dlc": samples.scores["dlc"]})  # the others are of that record
        artefacts.move(folder, aside)
    if provenance.is_done(workdir, "training", recorder.inputs):
        echo("training record: unchanged, not made again")
    else:
        echo(
            f"training record: {recorder.num_epochs} epochs on everything, and "
            f"{recorder.early_epoch} in {len(recorder.seeds) - 1} more runs"
        )


def _write_columns(workdir: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes `scores.parquet` with these columns, unless it has them."""
    samples = artefacts.read_scores(workdir)
    if not artefacts.same_arrays(columns, samples.scores):
        artefacts.write_scores(workdir, dataclasses.replace(samples, scores=columns))
        provenance.refresh(workdir, "score")


def _dlc_inputs(config: Config, made_of: dict[str, Any]) -> str:
    settings = {k: v for k, v in config.to_dict()["probe"].items() if k not in NOT_IN_LOSSES}
    if config.probe.num_probes != AUTO:
        del settings["agreement"]
    return artefacts.json_hash(
        {
            "version": __version__,
            "seed": config.seed,
            "probe": settings,
            **made_of,
        }
    )


def mid_grey_note(stage: str, ids: list[str]) -> str:
    """Returns the note on constant images, which `min_max` cannot stretch."""
    return (
        f"{stage}: note: {len(ids)} constant images are mid-grey by dataset.deep_images=min_max: "
        f"{checks.listed(map(visible, ids))}"
    )


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Returns what the provenance records of any data set, scored or only tested on."""
    return {
        "source": dataset.name,
        "fingerprint": dataset.fingerprint,
        "num_samples": len(dataset),
        "num_classes": dataset.num_classes,
        "label_table": dataset.label_table,
        "empty_classes": dataset.empty_classes,
        "left_out": dataset.left_out,
        "deep_images": dataset.deep_images,
        "mid_grey": sorted(dataset.mid_grey),
    }


def _scored_facts(dataset: Dataset, probes: ProbeLosses) -> dict[str, Any]:
    sizes = np.bincount(probes.labels, minlength=dataset.num_classes)
    return dataset_facts(dataset) | {
        "skipped": probes.skipped,
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
