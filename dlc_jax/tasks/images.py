"""Images: scored by an encoder that is then fine-tuned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import checks
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.datasets.files import left_out_text
from dlc_jax.distributed import Run, make_mesh
from dlc_jax.encoders import Encoder, load_encoder
from dlc_jax.exports import EXPORTS, RELEASED, export
from dlc_jax.planning.image_costs import ImageCosts
from dlc_jax.planning.image_plan import plan_of_images
from dlc_jax.planning.machine import Mesh
from dlc_jax.planning.plan import Plan
from dlc_jax.planning.speed import decoding_speed
from dlc_jax.selection import Cell
from dlc_jax.tasks.agreement import agree, agree_on_images
from dlc_jax.tasks.export_step import ExportStep, export_steps
from dlc_jax.tasks.image_measurements import (
    InputStep,
    LossesStep,
    Scored,
    dataset_facts,
    note_mid_grey,
)
from dlc_jax.tasks.measurements import TableStep, check_is_what_was_scored, scored_encoder
from dlc_jax.tasks.released import check_released, released_steps
from dlc_jax.tasks.task import Sources, Training
from dlc_jax.training.images import Finetuner, Recorder, class_ids_by_name
from dlc_jax.tuning import FinetuneTrials
from dlc_jax.types import Dataset, Selection
from dlc_jax.workspace import Workspace, artefacts, records

_DECIDED = ("pooling", "mean", "std")  # settings of the encoder that it may decide itself


class ImageTask:
    """See `Task`.

    Args:
      config: Checked configuration.
      say: Takes each line meant for the user.
    """

    easiest_hardest = artefacts.PICTURE
    left_out = "unreadable samples left out"
    encoder_settings: tuple[str, ...] = ("image_size", *_DECIDED)

    def __init__(self, config: Config, say: Callable[[str], None]):
        self._config, self._say = config, say
        self._sources = Sources(self._read, agree_on_images)
        self.load = self._sources.load

    def _read(self, source: str) -> Dataset:
        dataset = self._config.dataset.load(source)
        if dataset.left_out:
            self._say(f"{source}: left out: {left_out_text(dataset.left_out)}")
        if dataset.empty_classes:
            names = checks.listed(map(repr, dataset.empty_classes))
            self._say(f"{source}: note: classes without samples, left out: {names}")
        return dataset

    def _load_together(self) -> tuple[Dataset, Dataset]:
        """Returns training and test set, in all processes."""
        sources, load = self._config.dataset, self._sources.load_together
        assert sources.test is not None  # checked with the configuration
        return load(sources.train), load(sources.test)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        """The encoder with what `mode` decides filled in."""
        return load_configured(self._config, self._say).for_mode(self._config.mode)

    def encoder_fingerprint(self) -> str:
        return self._encoder.fingerprint

    def check(self, workspace: Workspace) -> None:
        config = self._config
        if "export" in config.stages:
            workspace.alone(lambda: self._check_exports(workspace.root))
        if "finetune" in config.stages:
            train, test = self._load_together()
            class_ids_by_name(test, train)

    def _check_exports(self, root: Path) -> None:
        config, dataset = self._config, self.load(self._config.dataset.train)
        forms = config.export.forms
        for check in dict.fromkeys(EXPORTS[form].check for form in forms if form in EXPORTS):
            if check is not None:
                check(dataset, "export.forms")
        if RELEASED in forms:
            check_released(config, root, dataset)

    def score(self, workspace: Workspace) -> Config:
        config = self._config
        dataset, encoder = self._sources.load_together(config.dataset.train), self._encoder
        agree({f"encoder.weights {config.encoder.weights}": encoder.fingerprint})
        encoder.check_image_size(config.encoder.image_size)
        decided = {name: getattr(encoder, name) for name in _DECIDED}
        settings = dataclasses.replace(config.encoder, **decided)
        resolved = dataclasses.replace(config, encoder=settings)
        scored = Scored(resolved, dataset, encoder, self._say)
        if not workspace.ensure(LossesStep(scored, config.asked)):
            self._say("score: unchanged, not run again")
        workspace.alone(lambda: self._write_table(scored, workspace))
        for name in config.need.measured:
            if not workspace.ensure(InputStep(scored, name)):
                self._say(f"{name}: unchanged, not measured again")
        if config.need.training:
            self._record_training(scored, workspace)
            workspace.alone(lambda: self._write_table(scored, workspace))
        return resolved

    @staticmethod
    def _write_table(scored: Scored, workspace: Workspace) -> None:
        workspace.ensure(TableStep(workspace.root, scored.dataset.class_names))

    def _record_training(self, scored: Scored, workspace: Workspace) -> None:
        """Trains on the whole set, unless that was done."""
        config, folder = scored.config, workspace.root / artefacts.TRAINING
        recorder = Recorder(
            scored.encoder,
            config.images(scored.dataset),
            config.finetune,
            config.record,
            seed=config.seed,
            conventions=config.conventions,
            run=Run(folder, config.mesh.make(), progress=True),
            say=workspace.say,
        )
        training = Workspace(folder, workspace.say)

        def make_room() -> bool:
            """Moves other training out of the way; returns whether this one is there."""
            there = records.read(folder, records.RUN)
            if there is not None and there.difference(recorder):
                workspace.remove(records.file_of("training"))  # how the stage ran
                workspace.set_run_aside(artefacts.TRAINING, f"training-{there.identity[:12]}")
                self._write_table(scored, workspace)  # columns were of that training
            identity = records.identity_of(recorder)
            workspace.take_runs_back(artefacts.TRAINING, f"training-{identity[:12]}")
            return training.has(recorder)

        def seconds() -> float:
            record = records.read(folder, records.RUN)
            return 0.0 if record is None else record.seconds

        if workspace.broadcast(make_room):
            workspace.say("training record: unchanged, not made again")
        else:
            more = f"{recorder.early_epoch} in {len(recorder.seeds) - 1} more runs"
            epochs = recorder.num_epochs
            workspace.say(f"training record: {epochs} epochs on everything, and {more}")
        training.ensure(recorder)
        values = config.to_dict()
        made_with = {name: values[name] for name in ("mode", "seed", "finetune", "record")}
        workspace.note("training", made_with, workspace.broadcast(seconds))

    def exports(self, kept: Mapping[Cell, Selection], root: Path) -> Iterable[ExportStep]:
        config, data = self._config, self.load(self._config.dataset.train)
        identity = f"{data.name} {data.fingerprint}"

        def writer(kept: Selection, part: str) -> Callable[[str, Path], Any]:
            return lambda form, path: export(data, kept, path, form=form, part=part, overwrite=True)

        yield from export_steps(config, root, kept, identity, writer)
        if RELEASED in config.export.forms:
            yield from released_steps(config, root, kept, data)

    def training(self, workspace: Workspace) -> Training:
        config, encoder = self._config, self._encoder
        agree({f"encoder.weights {config.encoder.weights}": encoder.fingerprint})
        if (scored := scored_encoder(workspace.root, encoder.fingerprint)) is not None:
            trained = f"{config.encoder.name} {config.encoder.weights}"
            self._say(f"finetune: note: the encoder is {trained}; the scores are of {scored}")
        train, test = self._load_together()
        images, run = config.images(train), Run(None, config.mesh.make(), progress=True)

        def make_trainer() -> Finetuner:
            return Finetuner(encoder, images, test, config.finetune, config.conventions, run)

        def facts() -> dict[str, Any]:
            note_mid_grey("finetune", test, self._say)
            return {"test_dataset": dataset_facts(test)}

        settings = config.to_dict()
        made_with = {name: settings[name] for name in ("mode", "dataset", "encoder", "finetune")}
        made_with["encoder_fingerprint"] = encoder.fingerprint
        made_with["test_fingerprint"] = test.fingerprint
        return Training(train, encoder.fingerprint, make_trainer, made_with, facts)

    def trials(self, workspace: Workspace, ids: np.ndarray) -> FinetuneTrials:
        config, dataset = self._config, self.load(self._config.dataset.train)
        check_is_what_was_scored(workspace.root, dataset)
        scored = np.flatnonzero(np.isin(dataset.ids, ids))  # others could not be read
        images, mesh = config.images(dataset.subset(scored)), make_mesh(devices=jax.local_devices())
        run = Run(workspace.root / artefacts.TUNING, mesh)
        return FinetuneTrials(self._encoder, images, config.finetune, mode=config.mode, run=run)

    def plan(self, mesh: Mesh) -> Plan:
        config = self._config
        config.dataset.check()
        dataset = self.load(config.dataset.train)
        checks.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
        num_test = 0
        if config.dataset.test is not None:
            num_test = len(class_ids_by_name(self.load(config.dataset.test), dataset))
        encoder, size = self._encoder, config.encoder.image_size
        encoder.check_image_size(size)
        decoding = decoding_speed(dataset, size)
        title = (
            f"plan: {len(dataset):,} images of {dataset.num_classes} classes "
            f"({visible(dataset.name)}), {encoder.name} of {config.encoder.weights} at {size} px"
        )
        costs = ImageCosts(config, encoder, dataset, mesh, num_test, decoding.pixels)
        return plan_of_images(title, costs, decoding)


def load_configured(config: Config, echo: Callable[[str], None] | None = None) -> Encoder:
    """Returns the encoder that the configuration names, before `mode` decides anything."""
    settings = config.encoder
    given = {name: getattr(settings, name) for name in _DECIDED}
    encoder = load_encoder(settings.name, settings.weights, **given)
    if encoder.prefix and echo is not None:
        weights, prefix = visible(settings.weights), visible(encoder.prefix)
        echo(f"note: every name in {weights} begins with {prefix!r}, which is left out")
    return encoder
