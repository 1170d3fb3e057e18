"""What is measured of images: losses of probes, and inputs of selectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from dlc_jax import checks, reports
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.distributed import Run, processes, said_of
from dlc_jax.encoders import Encoder
from dlc_jax.masking import AUTO
from dlc_jax.probes import features, probe
from dlc_jax.scores import score
from dlc_jax.tasks.measurements import NOT_IN_LOSSES, input_file, write_certificate
from dlc_jax.types import Dataset, ProbeLosses
from dlc_jax.workspace import Written, artefacts

_SHORT_PATH = 0.5  # sparsity; both schedules of 50 probes go beyond it


class Scored(NamedTuple):
    """What is scored, and how.

    Attributes:
      config: Configuration with what the encoder decides filled in.
      dataset: Training data.
      encoder: As `mode` has it.
      say: Takes each line meant for the user.
    """

    config: Config
    dataset: Dataset
    encoder: Encoder
    say: Callable[[str], None]

    @property
    def made_of(self) -> dict[str, Any]:
        """Data, encoder and how images are seen, which decide every measurement."""
        images = self.config.images(self.dataset)
        return images.made_of(self.encoder.fingerprint, self.config.mode)

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
        probes = {k: v for k, v in config.to_dict()["probe"].items() if k not in NOT_IN_LOSSES}
        if config.probe.num_probes != AUTO:
            del probes["agreement"]
        return {"seed": config.seed, "probe": probes, "made_of": self.scored.made_of}

    @property
    def settings(self) -> dict[str, Any]:
        values = self.scored.config.to_dict() | {"asked": self.asked}
        return {name: values[name] for name in ("mode", "seed", "encoder", "probe", "asked")}

    def compute(self, scratch: Path) -> ProbeLosses:
        config, dataset, encoder, say = self.scored
        run = self.scored.run(scratch)
        assert run.mesh is not None
        what = f"{len(dataset)} samples of {dataset.num_classes} classes"
        say(f"score: {what}, {encoder.name} on {said_of(run.mesh)}")
        if config.cache.max_gib and not config.cache.takes(len(dataset), config.encoder.image_size):
            say(
                f"score: note: decoded images are more than cache.max_gib={config.cache.max_gib:g};"
                " they are decoded twice, and not kept"
            )
        images, how = config.images(dataset), config.probe
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
        config, dataset, encoder, say = self.scored
        arrays = {name: getattr(probes, name) for name in ("losses", "sparsity", "labels", "ids")}
        artefacts.write_losses(root, **arrays)
        positions = np.flatnonzero(np.isin(dataset.ids, list(probes.skipped), invert=True))
        picture = reports.easiest_hardest(dataset, positions, score(probes))
        with artefacts.atomic(root / artefacts.PICTURE) as file:
            picture.save(file, "PNG", optimize=True)
        sizes = np.bincount(probes.labels, minlength=dataset.num_classes)
        singles = [dataset.class_names[j] for j in np.flatnonzero(sizes == 1)]
        scored = {"skipped": probes.skipped, "single_sample_classes": singles}
        named = {"name": encoder.name, "weights": config.encoder.weights}
        of_encoder = ("fingerprint", "mean", "std", "normalisation", "pooling")
        decided = {name: getattr(encoder, name) for name in of_encoder}
        facts = {"dataset": dataset_facts(dataset) | scored, "encoder": named | decided}
        certificate = write_certificate(root, probes, config.seed, say)
        return Written([*self.files, *certificate], facts)


def _features(scored: Scored, run: Run) -> Float32[np.ndarray, "n d"]:
    config, dataset, encoder, _ = scored
    images = config.images(dataset)
    return features(encoder, images, mode=config.mode, compute=config.probe, run=run)


class Measurement(NamedTuple):
    """How an input of selectors is measured with the encoder.

    Attributes:
      measure: Returns the array, [n, d], in the order of the samples that were scored.
      settings: Names of the settings of `probe` that decide it, beside data and encoder.
    """

    measure: Callable[[Scored, Run], Float32[np.ndarray, "n d"]]
    settings: tuple[str, ...] = ("dtype",)


# By names in `INPUTS`.
MEASURED: Mapping[str, Measurement] = {"features": Measurement(_features)}


@dataclasses.dataclass(frozen=True, eq=False)
class InputStep:
    """An input of selectors, an array [n, d], `scores/<name>.npz`.

    Attributes:
      name: One of `MEASURED`.
    """

    scored: Scored
    name: str

    stage = "score"
    obsolete = (artefacts.UNFINISHED,)

    @property
    def kind(self) -> str:
        return self.name.replace("_", " ")

    @property
    def files(self) -> tuple[str, ...]:
        return (input_file(self.name),)

    @property
    def key(self) -> dict[str, Any]:
        return {**self.settings, "made_of": self.scored.made_of}

    @property
    def settings(self) -> dict[str, Any]:
        probe = self.scored.config.probe
        return {name: getattr(probe, name) for name in MEASURED[self.name].settings}

    def compute(self, scratch: Path) -> Float32[np.ndarray, "n d"]:
        found = MEASURED[self.name].measure(self.scored, self.scored.run(scratch))
        self.scored.say(f"{self.name}: {found.shape[1]} of each sample")
        return found

    def write(self, root: Path, found: Float32[np.ndarray, "n d"]) -> Written:
        ids = artefacts.read_scores(root).ids
        with artefacts.atomic(root / input_file(self.name)) as file:
            np.savez(file, allow_pickle=False, **{self.name: found}, ids=ids)
        return Written(self.files)


def note_mid_grey(stage: str, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Notes constant images, which `min_max` cannot stretch."""
    if ids := sorted(dataset.mid_grey):
        why = "constant images are mid-grey by dataset.deep_images=min_max"
        say(f"{stage}: note: {len(ids)} {why}: {checks.listed(map(visible, ids))}")


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
