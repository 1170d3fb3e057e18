"""The stage `score`: DLC of every sample, and whatever else the selected methods need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.distributed import Run
from dlc_jax.encoders import Encoder, load_encoder
from dlc_jax.stages.agreement import agree
from dlc_jax.stages.measurements import (
    InputStep,
    LossesStep,
    Scored,
    TableStep,
)
from dlc_jax.training.images import Recorder
from dlc_jax.training.images.recorder import RecordStep
from dlc_jax.types import Dataset
from dlc_jax.workspace import Workspace, artefacts, records

Load: TypeAlias = Callable[[str], Dataset]  # by source


def run_score(config: Config, workspace: Workspace, load: Load) -> Config:
    """Scores what is not scored yet.

    Args:
      config: Checked configuration.
      workspace: Where `scores/` goes.
      load: Loads a data set by its source.
    Returns:
      The configuration with what the encoder decides filled in.
    Raises:
      ValueError: anything wrong with data, encoder or training.
    """
    settings = config.encoder
    dataset = load(config.dataset.train)
    encoder = load_configured(config, workspace.say)
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
    scored = Scored(resolved, dataset, resolved_encoder, workspace.say)
    if not workspace.ensure(LossesStep(scored, config.asked)):
        workspace.say("score: unchanged, not run again")
    workspace.alone(lambda: _write_table(scored, workspace))
    for name in config.need.measured:
        if not workspace.ensure(InputStep(scored, name)):
            workspace.say(f"{name}: unchanged, not measured again")
    if config.need.training:
        _record_training(scored, encoder, workspace)
        workspace.alone(lambda: _write_table(scored, workspace))
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


def _record_training(scored: Scored, encoder: Encoder, workspace: Workspace) -> None:
    """Trains on the whole set, unless that was done."""
    config, folder = scored.config, workspace.root / artefacts.TRAINING
    recorder = Recorder(
        encoder,
        config.images(scored.dataset),
        config.finetune,
        config.record,
        seed=config.seed,
        conventions=config.conventions,
        run=Run(None, config.mesh.make(), progress=True),
    )

    step, training = RecordStep(recorder, folder, workspace.say), Workspace(folder, workspace.say)

    def make_room() -> bool:
        """Moves training of other settings out of the way; returns whether this one is there."""
        there = records.read(folder, records.RUN)
        if there is not None and there.difference(step):
            workspace.remove(records.file_of("training"))  # how the stage ran
            workspace.set_run_aside(artefacts.TRAINING, f"training-{there.identity[:12]}")
            _write_table(scored, workspace)  # columns were of that training
        identity = records.identity_of(step)
        workspace.take_runs_back(artefacts.TRAINING, f"training-{identity[:12]}")
        return training.has(step)

    if workspace.broadcast(make_room):
        workspace.say("training record: unchanged, not made again")
    else:
        workspace.say(
            f"training record: {recorder.num_epochs} epochs on everything, and "
            f"{recorder.early_epoch} in {len(recorder.seeds) - 1} more runs"
        )
    training.ensure(step)
    values = config.to_dict()
    made_with = {name: values[name] for name in ("mode", "seed", "finetune", "record")}
    workspace.note("training", made_with, workspace.broadcast(lambda: step.seconds))


def _write_table(scored: Scored, workspace: Workspace) -> None:
    workspace.ensure(TableStep(scored, workspace.root))
