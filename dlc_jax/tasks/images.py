"""Images: scored by an encoder that is then fine-tuned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from dlc_jax import expect, reports
from dlc_jax.config import Config
from dlc_jax.datasets.files import left_out_text
from dlc_jax.distributed import Run, make_mesh, processes, said_of
from dlc_jax.encoders import ENCODERS, Encoder, load_encoder
from dlc_jax.encoders.converted import is_converted
from dlc_jax.expect import visible
from dlc_jax.exports import EXPORTS, RELEASED, export
from dlc_jax.masking import AUTO, masked_text
from dlc_jax.planning.image_plan import ImageCosts, plan_of_images
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.plan import Plan
from dlc_jax.planning.speed import decoding_speed
from dlc_jax.preprocess.images import Images
from dlc_jax.preprocess.transform import PAPER
from dlc_jax.probes import features, probe
from dlc_jax.scores import score
from dlc_jax.selection import Cell, informative_probes
from dlc_jax.tasks import doubts, measurements
from dlc_jax.tasks.agreement import agree, agree_on_images
from dlc_jax.tasks.exports import ExportStep, check_released, export_steps, released_steps
from dlc_jax.tasks.measurements import Measurement
from dlc_jax.tasks.task import Sources, Training
from dlc_jax.training.images import Finetuner, Recorder, class_ids_by_name
from dlc_jax.tuning import FinetuneTrials
from dlc_jax.types import Dataset, ProbeLosses, Selection
from dlc_jax.workspace import Workspace, Written, artefacts, records

_SHORT_PATH = 0.5  # sparsity; both schedules of 50 probes go beyond it


class Scored(NamedTuple):
    """What is scored, and how.

    Attributes:
      config: Configuration with what the encoder decides filled in.
      dataset: Training data.
      encoder: As `mode` has it.
      say: Takes each line meant for the user.
      target: What selected samples should be like; None: nothing is asked for.
      second_encoder: Another encoder, as `mode` has it; None: nothing is asked for.
    """

    config: Config
    dataset: Dataset
    encoder: Encoder
    say: Callable[[str], None]
    target: Dataset | None
    second_encoder: Encoder | None = None

    @property
    def by_the_way(self) -> dict[str, np.ndarray]:
        """Nothing: every input of images has a pass of its own."""
        return {}

    @property
    def made_of(self) -> dict[str, Any]:
        """Data, encoder and how images are seen, which decide every measurement."""
        return self.images.made_of(self.encoder.fingerprint, self.config.mode)

    @property
    def images(self) -> Images:
        """Training data with how it is read and prepared."""
        return self.config.images(self.dataset, self.encoder.transform)

    def run(self, scratch: Path) -> Run:
        """Where and on what measurements run."""
        return Run(scratch, self.config.mesh.make(of_cores=True), progress=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LossesStep:
    """Losses of every probe and sample, their certificate, and a picture of the extremes."""

    scored: Scored
    asked: dict[str, Any]  # settings as the user gave them

    name = stage = "score"
    kind = "losses"
    files = (artefacts.LOSSES, artefacts.PICTURE)
    obsolete = (artefacts.UNFINISHED,)

    @property
    def key(self) -> dict[str, Any]:
        config = self.scored.config
        others = {*measurements.NOT_IN_LOSSES}
        if config.probe.num_probes != AUTO:
            others.add("agreement")
        probes = {k: v for k, v in config.to_dict()["probe"].items() if k not in others}
        return {"seed": config.seed, "probe": probes, "made_of": self.scored.made_of}

    @property
    def settings(self) -> dict[str, Any]:
        values = self.scored.config.to_dict() | {"asked": self.asked}
        return {name: values[name] for name in ("mode", "seed", "encoder", "probe", "asked")}

    @property
    def _masked(self) -> str:
        return masked_text(self.scored.encoder.params, self.scored.encoder.is_prunable)

    def compute(self, scratch: Path) -> ProbeLosses:
        config, dataset, encoder, say, *_ = self.scored
        images, run = self.scored.images, self.scored.run(scratch)
        assert run.mesh is not None
        what = f"{len(dataset)} samples of {dataset.num_classes} classes"
        unusual = _unusual(encoder, images.side)
        say(f"score: {what}, {encoder.name} on {said_of(run.mesh)}{unusual}")
        say(f"score: masks {self._masked}")
        if config.cache.max_gib and not config.cache.takes(len(dataset), images.side):
            say(
                f"score: note: decoded images are more than cache.max_gib={config.cache.max_gib:g};"
                " they are decoded twice, and not kept"
            )
        how = config.probe
        probes = probe(
            encoder, images, mode=config.mode, seed=config.seed, path=how, compute=how, run=run
        )
        dataset.mid_grey.update(*processes.everyones(sorted(dataset.mid_grey)))
        note_mid_grey("score", dataset, say)
        last = probes.sparsity[-1]
        say(f"score: {len(probes.sparsity)} probes up to sparsity {last:.2f}")
        is_grid = how.placement == "grid" and how.num_probes != AUTO
        if is_grid and last < _SHORT_PATH:
            say(
                "score: note: the path stops early, where losses are nearly the unmasked network's;"
                " --config.probe.placement=midpoint spreads the probes over all of it"
            )
        return probes

    def write(self, root: Path, probes: ProbeLosses) -> Written:
        config, dataset, encoder, say, *_ = self.scored
        names = ("losses", "sparsity", "labels", "ids", "nearest")
        artefacts.write_losses(root, **{name: getattr(probes, name) for name in names})
        positions = np.flatnonzero(np.isin(dataset.ids, list(probes.skipped), invert=True))
        picture = reports.easiest_hardest(dataset, positions, score(probes))
        with artefacts.atomic(root / artefacts.PICTURE) as file:
            picture.save(file, "PNG", optimize=True)
        sizes = np.bincount(probes.labels, minlength=dataset.num_classes)
        singles = [dataset.class_names[j] for j in np.flatnonzero(sizes == 1)]
        scored = {"skipped": probes.skipped, "single_sample_classes": singles}
        named = {"name": encoder.name, "weights": config.encoder.weights, "masked": self._masked}
        of_encoder = ("fingerprint", "mean", "std", "normalisation", "pooling")
        decided = {name: getattr(encoder, name) for name in of_encoder}
        decided["transform"] = encoder.transform.described(self.scored.images.side)
        is_informative = informative_probes(probes)
        say(
            f"score: {is_informative.sum()} of {len(is_informative)} probes carry information: "
            "more samples than chance has it are nearest to their own class"
        )
        facts = {
            "dataset": dataset_facts(dataset) | scored,
            "encoder": named | decided,
            doubts.SHARE: is_informative.mean(),
        }
        certificate = measurements.write_certificate(root, probes, config.seed, say)
        return Written([*self.files, *certificate], facts)


def _features(scored: Scored, run: Run) -> Float32[np.ndarray, "n d"]:
    config, encoder = scored.config, scored.encoder
    return features(encoder, scored.images, mode=config.mode, compute=config.probe, run=run)


def _features_of_targets(scored: Scored, run: Run) -> Float32[np.ndarray, "q d"]:
    assert scored.target is not None  # checked with the configuration
    found = _features(scored._replace(dataset=scored.target), run)
    measurements.note_left_out(scored, len(found))
    return found


def _second_features(scored: Scored, run: Run) -> Float32[np.ndarray, "n d"]:
    config, encoder = scored.config, scored.second_encoder
    assert encoder is not None  # nothing asks for its features then
    images = scored.images
    if encoder.transform != images.transform:
        images = dataclasses.replace(images, transform=encoder.transform, size=None)
    encoder.check_image_size(images.side)
    return features(encoder, images, mode=config.mode, compute=config.probe, run=run)


# By names in `INPUTS`.
MEASURED: Mapping[str, Measurement] = {
    "features": Measurement(_features),
    "second_features": Measurement(_second_features),
    "similarities": Measurement(_features_of_targets, compared=measurements.similarities_to),
}


def _unusual(encoder: Encoder, size: int) -> str:
    """Returns how images are prepared, to go on with, if not as the paper does it."""
    transform = encoder.transform
    return "" if transform == PAPER else f"; images: {transform.described(size)}"


def note_mid_grey(stage: str, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Notes constant images, which `min_max` cannot stretch."""
    if ids := sorted(dataset.mid_grey):
        why = "constant images are mid-grey by dataset.deep_images=min_max"
        say(f"{stage}: note: {len(ids)} {why}: {expect.listed(map(visible, ids))}")


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Returns facts about a data set, scored or only tested on, for its record."""
    as_named = ("num_classes", "label_table", "empty_classes", "left_out", "deep_images")
    return {
        "source": dataset.name,
        "fingerprint": dataset.fingerprint,
        "num_samples": len(dataset),
        **{name: getattr(dataset, name) for name in as_named},
        "mid_grey": sorted(dataset.mid_grey),
    }


_DECIDED = ("pooling", "mean", "std")  # settings of the encoder that it may decide itself


def _read(config: Config, say: Callable[[str], None], source: str) -> Dataset:
    dataset = config.dataset.load(source)
    if dataset.left_out:
        say(f"{source}: left out: {left_out_text(dataset.left_out)}")
    if dataset.empty_classes:
        names = expect.listed(map(repr, dataset.empty_classes))
        say(f"{source}: note: classes without samples, left out: {names}")
    return dataset


class ImageTask:
    """See `Task`.

    Args:
      config: Checked configuration.
      say: Takes each line meant for the user.
    """

    easiest_hardest = artefacts.PICTURE
    left_out = "unreadable samples left out"
    encoder_settings: tuple[str, ...] = ("image_size", "transform", "prunable", *_DECIDED)

    def __init__(self, config: Config, say: Callable[[str], None]):
        self._config, self._say = config, say
        # no bound method: in a circle of references the encoder would outlive the task
        self._sources = Sources(functools.partial(_read, config, say), agree_on_images)
        self.load = self._sources.load

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
        side = config.images(dataset, encoder.transform).side
        encoder.check_image_size(side)
        decided = {name: getattr(encoder, name) for name in _DECIDED}
        transform = "paper" if encoder.transform == PAPER else "model"
        settings = dataclasses.replace(
            config.encoder, name=encoder.name, image_size=side, transform=transform, **decided
        )
        resolved = dataclasses.replace(config, encoder=settings)
        target = config.selection.target
        others = None if target is None else self._sources.load_together(target)
        scored = Scored(resolved, dataset, encoder, self._say, others, self._second_encoder())
        if not workspace.ensure(LossesStep(scored, config.asked)):
            self._say("score: unchanged, not run again")
        workspace.alone(lambda: self._write_table(scored, workspace))
        workspace.alone(lambda: doubts.list_suspects(workspace, dataset))
        measurements.measure_inputs(workspace, scored, MEASURED)
        if "features" in config.need.measured:
            limit = config.selection.max_similarity or doubts.SIMILAR
            near = (workspace.root, dataset.class_names, limit, self._say)
            workspace.alone(lambda: workspace.ensure(doubts.NearDuplicatesStep(*near)))
        if config.need.training:
            self._record_training(scored, workspace)
            workspace.alone(lambda: self._write_table(scored, workspace))
        return resolved

    def _second_encoder(self) -> Encoder | None:
        if (said := self._config.selection.second_encoder) is None:
            return None
        name, _, weights = said.partition("=")
        if name not in ENCODERS and not is_converted(name):
            name, weights = "", said
        try:
            encoder = load_encoder(name or None, weights).for_mode(self._config.mode)
        except expect.InputError as error:
            raise expect.InputError(f"selection.second_encoder {said!r}: {error}") from error
        agree({f"selection.second_encoder {said}": encoder.fingerprint})
        return encoder

    @staticmethod
    def _write_table(scored: Scored, workspace: Workspace) -> None:
        workspace.ensure(measurements.TableStep(workspace.root, scored.dataset.class_names))

    def _record_training(self, scored: Scored, workspace: Workspace) -> None:
        """Trains on the whole set, unless that was done."""
        config, folder = scored.config, workspace.root / artefacts.TRAINING
        recorder = Recorder(
            scored.encoder,
            scored.images,
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
        if (scored := measurements.scored_encoder(workspace.root, encoder.fingerprint)) is not None:
            trained = f"{encoder.name} {config.encoder.weights}".rstrip()
            self._say(f"finetune: note: the encoder is {trained}; the scores are of {scored}")
        train, test = self._load_together()
        images = config.images(train, encoder.transform)
        run = Run(None, config.mesh.make(), progress=True)

        def make_trainer() -> Finetuner:
            return Finetuner(encoder, images, test, config.finetune, config.conventions, run)

        def facts() -> dict[str, Any]:
            note_mid_grey("finetune", test, self._say)
            return {"test_dataset": dataset_facts(test)}

        settings = config.to_dict()
        settings["encoder"] |= {"name": encoder.name}  # which the weights may have decided
        made_with = {name: settings[name] for name in ("mode", "dataset", "encoder", "finetune")}
        made_with["encoder_fingerprint"] = encoder.fingerprint
        made_with["transform"] = encoder.transform.described(images.side)
        made_with["test_fingerprint"] = test.fingerprint
        return Training(train, encoder.fingerprint, make_trainer, made_with, facts)

    def trials(self, workspace: Workspace, ids: np.ndarray) -> FinetuneTrials:
        config, dataset = self._config, self.load(self._config.dataset.train)
        measurements.check_is_what_was_scored(workspace.root, dataset)
        scored = np.flatnonzero(np.isin(dataset.ids, ids))  # others could not be read
        images = config.images(dataset.subset(scored), self._encoder.transform)
        run = Run(workspace.root / artefacts.TUNING, make_mesh(devices=jax.local_devices()))
        return FinetuneTrials(self._encoder, images, config.finetune, mode=config.mode, run=run)

    def plan(self, mesh: MeshSize) -> Plan:
        config = self._config
        config.dataset.check()
        dataset = self.load(config.dataset.train)
        expect.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
        num_test = 0
        if config.dataset.test is not None:
            num_test = len(class_ids_by_name(self.load(config.dataset.test), dataset))
        encoder = self._encoder
        size = config.images(dataset, encoder.transform).side
        encoder.check_image_size(size)
        decoding = decoding_speed(dataset, size, encoder.transform)
        title = (
            f"plan: {len(dataset):,} images of {dataset.num_classes} classes "
            f"({visible(dataset.name)}), {encoder.name} of {config.encoder.weights} at {size} px"
            f"{_unusual(encoder, size)}"
        )
        costs = ImageCosts(config, encoder, dataset, mesh, num_test, decoding.pixels)
        return plan_of_images(title, costs, decoding)


def load_configured(config: Config, echo: Callable[[str], None] | None = None) -> Encoder:
    """Returns the encoder that the configuration names, before `mode` decides anything."""
    settings = config.encoder
    names = (*ImageTask.encoder_settings, "drop_path", "dropout")  # which no score depends on
    given = {name: getattr(settings, name) for name in names}
    encoder = load_encoder(settings.name, settings.weights, **given)
    if echo is not None and encoder.batch_size is not None:
        what = f"a bundle for {encoder.batch_size} images of {encoder.image_size} px at a time"
        echo(f"note: {visible(settings.weights)} is {what}: probe.chunk is 1")
    if encoder.prefix and echo is not None:
        weights, prefix = visible(settings.weights), visible(encoder.prefix)
        echo(f"note: every name in {weights} begins with {prefix!r}, which is left out")
    return encoder
