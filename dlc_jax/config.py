"""Every setting and its default, checked before anything is loaded.

A configuration file builds on `default_config()`; `Config.of` turns what the command line made of
it into frozen dataclasses. Nothing else reads a ConfigDict.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict
from tabulate import tabulate

from dlc_jax import checks
from dlc_jax.datasets import load_dataset
from dlc_jax.datasets.instructions import TEMPLATES
from dlc_jax.distributed import cores_are_devices, make_mesh, one_device
from dlc_jax.encoders import ENCODERS, POOLINGS, check_pooling
from dlc_jax.encoders.language_model import DECODER
from dlc_jax.evaluation.settings import EvaluationConfig
from dlc_jax.exports import FORMS, PARTS, RELEASED
from dlc_jax.exports.instructions import INSTRUCTION_EXPORTS
from dlc_jax.exports.released import PRETRAINS, check_name
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess import ON_CORRUPT, ImageCache, Images
from dlc_jax.preprocess.tokens import TOKENS_PER_BATCH
from dlc_jax.probes import Compute
from dlc_jax.scores import SCORES
from dlc_jax.selection import AUTO, FULL, Cell
from dlc_jax.selection.settings import Need, SelectionConfig
from dlc_jax.training.images import FinetuneConfig, RecordConfig
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.tuning import LinearProbeConfig
from dlc_jax.tuning.settings import TuningConfig
from dlc_jax.types import DEEP_IMAGES, Conventions, Dataset, setting

STAGES = ("plan", "score", "tune", "select", "export", "finetune", "report")
INSTRUCTION_STAGES = ("plan", "score", "select", "export", "finetune", "evaluate", "report")
_DEFAULT_STAGES = ("score", "select")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to prune."""

    train: str = setting("", "source to prune: folder:, parquet:, hf:, ...; jsonl: of instructions")
    test: str | None = setting(None, "source to test on; read by the stage finetune only")
    on_corrupt: str = setting(Images.on_corrupt, f"unreadable sample: {' or '.join(ON_CORRUPT)}")
    deep_images: str | None = setting(
        None, f"more than 8 bits a channel: {', '.join(DEEP_IMAGES)}; None: by mode"
    )
    image_column: str | None = setting(
        None, "column of the images (tar: a suffix); None: image or another usual name"
    )
    label_column: str | None = setting(
        None, "column of the labels (tar: a JSON key); None: label or another usual name"
    )
    template: str | None = setting(
        None, f"of instructions: {', '.join(TEMPLATES)}; None: by their columns"
    )
    category: str | None = setting(None, "column of instructions with their class, if any")

    def check(self) -> None:
        if not self.train:
            raise checks.InputError(
                "dataset.train: missing; give a source such as folder:/data/flowers."
            )
        checks.one_of("dataset.on_corrupt", self.on_corrupt, ON_CORRUPT)
        if self.deep_images is not None:
            checks.one_of("dataset.deep_images", self.deep_images, DEEP_IMAGES)
        if self.template is not None:
            checks.one_of("dataset.template", self.template, TEMPLATES)

    def load(self, source: str) -> Dataset:
        """Returns a data set of images, read as these settings say; see `load_dataset`."""
        return load_dataset(
            source,
            deep_images=self.deep_images or "error",
            image_column=self.image_column,
            label_column=self.label_column,
        )


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The pre-trained network that is probed."""

    name: str = setting("resnet18", f"{', '.join(ENCODERS)}; {DECODER}: a language model")
    weights: str = setting(
        "", "hub id, .safetensors file, folder, demo:resnet18 or demo:tiny-llama"
    )
    max_length: int | None = setting(
        None, "of instructions, in tokens; None: 2048, or the model's limit if it is lower"
    )
    image_size: int = setting(Images.size, "side of the images in pixels")
    pooling: str | None = setting(None, f"ViT pooling: {', '.join(POOLINGS)}; None: by mode")
    mean: tuple[float, ...] | None = setting(None, "RGB mean; None: the checkpoint's, by mode")
    std: tuple[float, ...] | None = setting(None, "RGB deviation; None: the checkpoint's, by mode")

    def check(self) -> None:
        checks.one_of("encoder.name", self.name, (*ENCODERS, DECODER))
        if not self.weights:
            raise checks.InputError(
                "encoder.weights: missing; give a hub id such as 'timm/resnet18.tv_in1k', a "
                ".safetensors file or a folder."
            )
        checks.at_least("encoder.image_size", self.image_size, 8)
        if self.name != DECODER:
            check_pooling(self.name, self.pooling)
        if self.max_length is not None:
            checks.at_least("encoder.max_length", self.max_length, 2)
        checks.normalisation(self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Compute, PathSpec):
    """The learning path, how the encoder is masked, and how the probe program runs."""

    tokens_per_batch: int = setting(TOKENS_PER_BATCH, "tokens of instructions per call of it")

    def check(self) -> None:
        PathSpec.check(self)
        Compute.check(self)
        checks.at_least("probe.tokens_per_batch", self.tokens_per_batch, 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, over all processes; the three multiply to their number."""

    data: int = setting(-1, "parts of the samples; -1: all devices that are left")
    probe: int = setting(1, "parts of the masked networks")
    fsdp: int = setting(1, "devices that the weights of a language model are spread over")

    def check(self) -> None:
        if self.data != -1:
            checks.at_least("mesh.data", self.data, 1)
        checks.at_least("mesh.probe", self.probe, 1)
        checks.at_least("mesh.fsdp", self.fsdp, 1)

    def make(self, *, of_cores: bool = False) -> Mesh:
        """Returns the mesh; ValueError unless it has as many devices as are there.

        Args:
          of_cores: Whether cores may be devices, where `use_all_cores` made them so and nothing
            else is asked for; otherwise all cores are one. Of use where devices need not talk.
        """
        if cores_are_devices() and not of_cores and self == MeshConfig():
            return one_device()
        return make_mesh(self.data, self.probe, self.fsdp)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """In which forms selections are written for other programs."""

    forms: tuple[str, ...] = setting(("ids",), ", ".join(FORMS))
    parts: tuple[str, ...] = setting(("kept",), ", ".join(PARTS))
    datasets_dir: str | None = setting(None, "the released code's --datasets_dir; form released")
    released_name: str | None = setting(None, "its --dataset, such as DTD; form released")
    pretrain: str = setting("fully", f"its --pretrain: {' or '.join(PRETRAINS)}; form released")

    def check(self) -> None:
        forms = dict.fromkeys([*FORMS, *INSTRUCTION_EXPORTS])
        for key, choices in (("forms", forms), ("parts", PARTS)):
            values = getattr(self, key)
            if not values:
                raise checks.InputError(
                    f"export.{key}: expected one or more of {', '.join(choices)}."
                )
            for value in values:
                checks.one_of(f"export.{key}", value, choices)
        if RELEASED in self.forms:
            for key in ("datasets_dir", "released_name"):
                if not getattr(self, key):
                    raise checks.InputError(
                        f"export.{key}: missing; the form {RELEASED!r} needs it. Give the folder "
                        "and the name that the released code knows the data set by, such as /data "
                        "and DTD."
                    )
            check_name(self.released_name or "")
            checks.one_of("export.pretrain", self.pretrain, PRETRAINS)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    mode: str = setting("default", "default, or official: the released code's quirks")
    seed: int = setting(0, "seed of random masking and augmentation")
    stages: tuple[str, ...] = setting(
        _DEFAULT_STAGES, f"what to run, out of {', '.join(STAGES)}; of instructions evaluate too"
    )
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    cache: ImageCache = dataclasses.field(default_factory=ImageCache)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    linear_probe: LinearProbeConfig = dataclasses.field(default_factory=LinearProbeConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any] | ConfigDict) -> Config:
        """Returns the checked configuration, mode-dependent defaults filled in.

        Raises:
          ValueError: naming the key, on an unknown key, a wrong type or a value out of range.
        """
        config = _build(cls, dict(values), "")
        config.check()
        deep_images = config.dataset.deep_images or config.conventions.deep_images
        return dataclasses.replace(
            config,
            probe=config.probe.for_mode(config.mode),
            dataset=dataclasses.replace(config.dataset, deep_images=deep_images),
        )

    def check(self) -> None:
        checks.mode(self.mode)
        checks.seed(self.seed)
        if not self.stages:
            raise checks.InputError(f"stages: expected one or more of {', '.join(STAGES)}.")
        known = INSTRUCTION_STAGES if self.is_of_instructions else STAGES
        for stage in self.stages:
            checks.one_of("stages", stage, known)
        if {"score", "export", "finetune"} & set(self.stages):
            self.dataset.check()
        if {"plan", "score", "finetune", "evaluate"} & set(self.stages):
            self.encoder.check()
        if "finetune" in self.stages and not self.dataset.test and not self.is_of_instructions:
            raise checks.InputError(
                "dataset.test: missing; the stage 'finetune' tests on it. Give a source such as "
                "folder:/data/flowers/test."
            )
        self.mesh.check()
        self.probe.for_mode(self.mode)
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
        return Conventions.of(self.mode)

    def images(self, dataset: Dataset) -> Images:
        """Returns a data set of images with how these settings read it."""
        return Images(dataset, self.encoder.image_size, self.dataset.on_corrupt, self.cache)

    @property
    def is_of_instructions(self) -> bool:
        """Whether instructions are pruned, by a language model."""
        return self.encoder.name == DECODER

    @property
    def training(self) -> FinetuneConfig | LoraConfig:
        """How the stage `finetune` trains."""
        return self.lora if self.is_of_instructions else self.finetune

    def runs(self) -> list[Cell]:
        """Returns the cells to fine-tune on; the full set, at keep fraction 1, comes first."""
        full = [Cell(FULL, 1.0, None, seed) for seed in self.selection.seeds]
        return (full if self.training.full_set else []) + self.selection.cells()

    def _check_kind(self) -> None:
        """Raises ValueError where something asked for is not there for this kind of data."""
        if not self.is_of_instructions:
            for form in self.export.forms:
                checks.one_of("export.forms", form, FORMS)
            if self.mesh.fsdp > 1:
                raise checks.InputError(
                    f"mesh.fsdp: {self.mesh.fsdp}; expected 1: it spreads the weights of a "
                    f"language model, encoder.name {DECODER!r}."
                )
            if SCORES[self.selection.score].of == "responses":
                raise checks.InputError(
                    f"selection.score: {self.selection.score!r} is of instructions; expected "
                    f"encoder.name {DECODER!r} with it."
                )
            return
        if self.mesh.probe > 1:
            raise checks.InputError(
                f"mesh.probe: {self.mesh.probe}; expected 1: the masked copies of a language model "
                "are not divided among devices; its weights are, by mesh.fsdp."
            )
        for key in ("image_column", "label_column"):
            if getattr(self.dataset, key) is not None:
                raise checks.InputError(
                    f"dataset.{key}: instructions have no such column; expected None. Their "
                    "classes come from dataset.category."
                )
        if self.probe.augment:
            raise checks.InputError("probe.augment: instructions have no crops; expected False.")
        if self.mode != "default":
            raise checks.InputError("mode: of instructions there is no 'official' code.")
        need = self.need
        if need.measured or need.training:
            raise checks.InputError(
                "selection.methods: instructions have neither features nor a record of training; "
                "expected methods that need only scores, such as flexrand, easiest, ccs."
            )
        if "evaluate" in self.stages and self.evaluation.mmlu is None:
            raise checks.InputError(
                "evaluation.mmlu: missing; the stage 'evaluate' asks its questions. Give "
                "mmlu:<folder>, or demo:mmlu for a few of them."
            )
        if "export" in self.stages:
            for form in self.export.forms:
                checks.one_of("export.forms, of instructions", form, INSTRUCTION_EXPORTS)

    def _check_tuning(self) -> None:
        if self.mode == "official":
            raise checks.InputError(
                "stages: mode 'official' has no 'tune'; expected mode 'default'."
            )
        if AUTO in self.selection.splits and "flexrand" not in self.tuning.methods:
            raise checks.InputError(
                f"tuning.methods: {', '.join(self.tuning.methods)}; expected flexrand among them, "
                f"since selection.splits has {AUTO!r}."
            )
        if SCORES[self.selection.score].of == "training":
            raise checks.InputError(
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
        trained = {"finetune": self.finetune.decisive, "encoder": settings["encoder"]}
        return found | trained

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
    config = ConfigDict(_defaults(Config))
    config.lock()
    return config


def describe() -> str:
    """Returns one line per key: name, default, meaning."""
    rows = [
        (f"  --config.{key}", checks.shortened(repr(default), 24), doc)
        for key, default, doc in _keys(Config, "")
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def known_keys() -> list[str]:
    """Returns every key, dotted."""
    return [key for key, _, _ in _keys(Config, "")]


def _keys(section: Any, prefix: str) -> list[tuple[str, Any, str]]:
    rows = []
    for field, kind in _fields(section):
        if dataclasses.is_dataclass(kind):
            rows += _keys(kind, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}", field.default, field.metadata["doc"]))
    return rows


def _fields(section: Any) -> list[tuple[dataclasses.Field, Any]]:
    kinds = typing.get_type_hints(section)
    return [(field, kinds[field.name]) for field in dataclasses.fields(section)]


def _defaults(section: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, kind in _fields(section):
        if dataclasses.is_dataclass(kind):
            values[field.name] = _defaults(kind)
        elif typing.get_origin(kind) in (typing.Union, types.UnionType):
            # of any type for ConfigDict: `_convert` checks it, and reads the command line's text
            values[field.name] = config_dict.FieldReference(field.default, field_type=object)
        else:
            values[field.name] = field.default
    return values


def _build(section: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = dict((field.name, kind) for field, kind in _fields(section))
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            checks.one_of(f"configuration key {name!r}", name, [f"{prefix}{k}" for k in fields])
        kind = fields[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, (Mapping, ConfigDict)):
                raise checks.InputError(f"{name}: expected a group of settings, got {value!r}.")
            arguments[key] = _build(kind, dict(value), f"{name}.")
        else:
            arguments[key] = _convert(name, kind, value)
    return section(**arguments)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """Returns `value` as `kind`; text is read where the kind is not text alone."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value in (None, "None") and type(None) in choices:
            return None
        others = [choice for choice in choices if choice is not type(None)]
        for choice in sorted(others, key=lambda choice: choice is str):  # text fits anything: last
            try:
                return _convert(name, choice, value)
            except checks.InputError:
                continue
    elif origin is tuple:
        if isinstance(value, str):
            value = _literal(value)
        if isinstance(value, (int, float, str)):
            value = (value,)
        takes_text = str in (choices[0], *typing.get_args(choices[0]))
        if takes_text and isinstance(value, (tuple, list)):  # `easiest,hardest` as one text
            value = [part for item in value for part in str(item).split(",")]
        if isinstance(value, (tuple, list)):
            return tuple(_convert(name, choices[0], item) for item in value)
    elif kind is str and isinstance(value, str):
        return value
    elif kind in (int, float, bool):
        read = _literal(value) if isinstance(value, str) else value
        if type(read) is kind:
            return read
        if kind is float and type(read) is int:
            return float(read)
    expected = kind.__name__ if isinstance(kind, type) and origin is None else kind
    raise checks.InputError(f"{name}: expected {expected}, got {value!r}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
