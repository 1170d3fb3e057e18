"""Every setting and its default, checked before anything is loaded.

A configuration file builds on `default_config()`; `Config.of` turns what the command line made of
it into frozen dataclasses. Nothing else reads a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from tabulate import tabulate

from dlc_jax import expect
from dlc_jax.config import reading, sections
from dlc_jax.config.kinds import KINDS, DataKind, data_kind_of
from dlc_jax.datasets.layouts import RELEASED
from dlc_jax.evaluation import EvaluationConfig
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.images import Images
from dlc_jax.preprocess.transform import Transform
from dlc_jax.scores import SCORES
from dlc_jax.selection import AUTO, FULL, SELECTORS, Cell, Need, SelectionConfig
from dlc_jax.training.images import FinetuneConfig, RecordConfig
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.tuning import LinearProbeConfig, TuningConfig
from dlc_jax.types import Conventions, Dataset, setting


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    mode: str = setting(
        "default", "default, or official: as the released code of images or instructions"
    )
    seed: int = setting(0, "seed of random masking and augmentation")
    stages: tuple[str, ...] = setting(
        ("score", "select"),
        "what to run; " + "; ".join(f"of {k.name} {', '.join(k.stages)}" for k in KINDS.values()),
    )
    plan_details: bool = setting(
        False, "the stage plan prints passes, operations, bytes and parts of memory, too"
    )
    dataset: sections.DatasetConfig = dataclasses.field(default_factory=sections.DatasetConfig)
    encoder: sections.EncoderConfig = dataclasses.field(default_factory=sections.EncoderConfig)
    cache: ImageCache = dataclasses.field(default_factory=ImageCache)
    mesh: sections.MeshConfig = dataclasses.field(default_factory=sections.MeshConfig)
    probe: sections.ProbeConfig = dataclasses.field(default_factory=sections.ProbeConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    linear_probe: LinearProbeConfig = dataclasses.field(default_factory=LinearProbeConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    export: sections.ExportConfig = dataclasses.field(default_factory=sections.ExportConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any] | ConfigDict) -> Config:
        """Returns the checked configuration, mode-dependent defaults filled in.

        Raises:
          ValueError: naming the key, on an unknown key, a wrong type or a value out of range.
        """
        config = reading.build(cls, dict(values))
        config.check()
        deep_images = config.dataset.deep_images or config.conventions.deep_images
        dataset = dataclasses.replace(config.dataset, deep_images=deep_images)
        if config.conventions.reads_as_released:
            dataset = dataclasses.replace(dataset, template=RELEASED, turns="first")
        return dataclasses.replace(
            config,
            probe=config.probe.for_mode(config.mode),
            dataset=dataset,
            encoder=config.encoder.for_mode(config.mode),
        )

    def check(self) -> None:
        Conventions.of(self.mode)
        expect.seed(self.seed)
        kind = self.data_kind
        if not self.stages:
            raise expect.InputError(f"stages: expected one or more of {', '.join(kind.stages)}.")
        for stage in self.stages:
            expect.one_of("stages", stage, kind.stages)
        if {"score", "export", "finetune"} & set(self.stages):
            self.dataset.check()
        if {"plan", "score", "finetune", "evaluate"} & set(self.stages):
            self.encoder.check()
        if "finetune" in self.stages and not self.dataset.test and kind.needs_test:
            raise expect.InputError(
                "dataset.test: missing; the stage 'finetune' tests on it. Give a source such as "
                "folder:/data/flowers/test."
            )
        unmeasured = {"finetune", "report"} <= {*self.stages} and "evaluate" not in self.stages
        if unmeasured and "evaluate" in kind.stages:
            raise expect.InputError(
                f"stages: 'report' of {kind.name} shows what the stage 'evaluate' measures; "
                "expected 'evaluate' between 'finetune' and 'report', or no 'report'."
            )
        if "evaluate" in self.stages and self.evaluation.mmlu is None:
            raise expect.InputError(
                "evaluation.mmlu: missing; the stage 'evaluate' asks its questions. Give "
                "mmlu:<folder>, or demo:mmlu for a few of them."
            )
        self.mesh.check()
        self.probe.for_mode(self.mode)
        self.encoder.for_mode(self.mode)
        self.record.check()
        self.tuning.check()
        self.linear_probe.check()
        self.selection.check(self.conventions)
        if self.need.tuning:
            self._check_tuning()
        self._check_kind()
        self.export.check()
        self.finetune.check()
        self.lora.check()
        self.evaluation.check()

    @property
    def conventions(self) -> Conventions:
        """What `mode` decides."""
        return Conventions.of(self.mode, self.data_kind.released)

    def images(self, dataset: Dataset, transform: Transform) -> Images:
        """Returns a data set of images with how these settings, and the encoder's, read it."""
        size, on_corrupt = self.encoder.image_size, self.dataset.on_corrupt
        return Images(dataset, size, on_corrupt, self.cache, transform)

    @property
    def data_kind(self) -> DataKind:
        """Kind of data that is pruned, by the encoder."""
        return data_kind_of(self.encoder.name)

    @property
    def training(self) -> FinetuneConfig | LoraConfig:
        """How the stage `finetune` trains."""
        section: FinetuneConfig | LoraConfig = getattr(self, self.data_kind.training)
        return section

    def runs(self) -> list[Cell]:
        """Returns the cells to fine-tune on; the full set, at keep fraction 1, comes first."""
        full = [Cell(FULL, 1.0, None, seed) for seed in self.selection.seeds]
        return (full if self.training.full_set else []) + self.selection.cells()

    def _check_kind(self) -> None:
        """Raises ValueError where something asked for is not there for this kind of data."""
        kind, need = self.data_kind, self.need
        for key, (value, why) in kind.only.items():
            if (found := operator.attrgetter(key)(self)) != value:
                raise expect.InputError(f"{key}: {why}; expected {value!r}, got {found!r}.")
        # the released code of instructions measures losses of probes alone
        has_responses = "responses" in kind.measures and not self.conventions.reads_as_released
        for method in self.selection.methods:
            own = SELECTORS[method].score if method in SELECTORS else None
            if own and SCORES[own].of == "responses" and not has_responses:
                raise expect.InputError(
                    f"selection.methods: {method!r} is of the responses of instructions, which are "
                    f"not measured of {kind.name} in mode {self.mode!r}; expected other methods."
                )
        source = SCORES[self.selection.score].of
        for other in KINDS.values():
            if source in other.measures - kind.measures:
                raise expect.InputError(
                    f"selection.score: {self.selection.score!r} is of {other.name}; expected "
                    f"encoder.name {' or '.join(map(repr, other.encoders))} with it."
                )
        for source, is_needed, what in (
            ("encoder", need.measured, "features"),
            ("training", need.training, "record of training"),
        ):
            if is_needed and source not in kind.measures:
                raise expect.InputError(
                    f"selection.methods: {kind.name} have no {what}; expected methods that need "
                    "only scores, such as flexrand, easiest, ccs."
                )
        if need.tuning and "tune" not in kind.stages:
            raise expect.InputError(
                f"selection: {kind.name} have no stage 'tune', which {AUTO!r} needs; expected "
                "methods and splits by name."
            )
        if "export" in self.stages:
            for form in self.export.forms:
                expect.one_of("export.forms", form, kind.forms)
        if self.conventions.reads_as_released:
            self._check_released_instructions()

    def _check_released_instructions(self) -> None:
        """Raises ValueError for a setting that the released code of instructions does not have."""
        defaults = {field.name: field.default for field in dataclasses.fields(PathSpec)}
        asked = {k: v for k, v in defaults.items() if getattr(self.probe, k) != v}
        if asked:
            names = ", ".join(f"probe.{name}" for name in asked)
            settings = " ".join(f"--config.probe.{name}={value}" for name, value in asked.items())
            raise expect.InputError(
                f"{names}: mode 'official' of instructions has a path of its own; expected the "
                f"defaults, {settings}."
            )
        allowed: dict[str, list[Any]] = {
            "dataset.template": [RELEASED, None],
            "dataset.turns": ["first", "last"],
            "dataset.response_marker": [None],
            "dataset.category": [None],
            "selection.score": ["dlc"],
        }
        if "finetune" in self.stages:
            allowed["lora.loss_on"] = ["text"]
        for key, values in allowed.items():
            if (found := operator.attrgetter(key)(self)) not in values:
                raise expect.InputError(
                    f"{key}: mode 'official' of instructions has {values[0]!r} only, got {found!r}."
                )

    def _check_tuning(self) -> None:
        if self.mode == "official":
            raise expect.InputError(
                "stages: mode 'official' has no 'tune'; expected mode 'default'."
            )
        if AUTO in self.selection.splits and "flexrand" not in self.tuning.methods:
            raise expect.InputError(
                f"tuning.methods: {', '.join(self.tuning.methods)}; expected flexrand among them, "
                f"since selection.splits has {AUTO!r}."
            )
        if SCORES[self.selection.score].of == "training":
            raise expect.InputError(
                f"selection.score: {self.selection.score!r} comes from training on what {AUTO!r} "
                "holds out; expected 'dlc' with it."
            )
        if self.tuning.by == "finetune":
            self.dataset.check()
            self.encoder.check()

    @property
    def need(self) -> Need:
        """What the stages need, apart from DLC."""
        need = self.selection.need
        tuning = need.tuning or "tune" in self.stages
        measured = dict.fromkeys(need.measured)
        if tuning and self.tuning.needs_features:
            measured["features"] = None
        return Need(tuple(measured), need.training, tuning)

    @property
    def decides_auto(self) -> dict[str, Any]:
        """What decides what `auto` stands for at a keep fraction, besides scores and features."""
        settings = self.to_dict()
        found = {
            "seed": self.seed,
            "tuning": {k: v for k, v in settings["tuning"].items() if k != "tolerance"},
            "min_per_class": self.selection.min_per_class,
        }
        if self.tuning.by == "linear_probe":
            return found | {"linear_probe": self.linear_probe.decisive}
        usual = ("transform", "paper")  # of work directories that know no other
        encoder = {k: v for k, v in settings["encoder"].items() if (k, v) != usual}
        return found | {"finetune": self.finetune.decisive, "encoder": encoder}

    @property
    def asked(self) -> dict[str, Any]:
        """Settings of data and encoder, as JSON gives them back, for the record of their scores."""
        settings = json.loads(json.dumps(self.to_dict()))
        return {name: settings[name] for name in ("dataset", "encoder")}

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dictionaries of plain values."""
        return dataclasses.asdict(self)


def default_config() -> ConfigDict:
    """Returns all defaults as a locked ConfigDict, for configuration files to build on."""
    config = ConfigDict(reading.defaults(Config))
    config.lock()
    return config


def describe() -> str:
    """Returns one line per key: name, default, meaning."""
    rows = [
        (f"  --config.{key}", expect.shortened(repr(default), 24), doc)
        for key, default, doc in reading.keys(Config)
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def known_keys() -> list[str]:
    """Returns every key, dotted."""
    return [key for key, _, _ in reading.keys(Config)]
