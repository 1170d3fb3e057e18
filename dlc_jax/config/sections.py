"""Settings of data, encoder, probes, devices and exports."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dlc_jax import expect
from dlc_jax.config.kinds import KINDS
from dlc_jax.datasets import load_dataset
from dlc_jax.datasets.chat import TURNS
from dlc_jax.datasets.layouts import TEMPLATES, Reading
from dlc_jax.distributed import cores_are_devices, make_mesh, one_device
from dlc_jax.encoders import (
    ENCODERS,
    POOLINGS,
    TRANSFORMS,
    check_pooling,
    check_rates,
    default_transform,
)
from dlc_jax.encoders.converted import is_converted
from dlc_jax.encoders.language_model import CONVERTED_DECODER, DECODER
from dlc_jax.exports import FORMS, PARTS, RELEASED
from dlc_jax.exports.released import PRETRAINS, check_name
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess.images import ON_CORRUPT, Images
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.transform import PAPER
from dlc_jax.probes import Compute
from dlc_jax.types import DEEP_IMAGES, Conventions, Dataset, setting


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to prune."""

    train: str = setting("", "source to prune: folder:, parquet:, hf:, ...; jsonl: of instructions")
    test: str | None = setting(None, "source to test on; read by plan; by finetune, before scoring")
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
    columns: str | None = setting(
        None, "what instructions call their columns, such as prompt=question,response=answer"
    )
    turns: str = setting("last", f"which turns of a conversation count: {', '.join(TURNS)}")
    response_marker: str | None = setting(
        None, "what stands before the response in instructions of one column, text"
    )
    category: str | None = setting(None, "column of instructions with their class, if any")

    def check(self) -> None:
        if not self.train:
            raise expect.InputError(
                "dataset.train: missing; give a source such as folder:/data/flowers."
            )
        expect.one_of("dataset.on_corrupt", self.on_corrupt, ON_CORRUPT)
        if self.deep_images is not None:
            expect.one_of("dataset.deep_images", self.deep_images, DEEP_IMAGES)
        self.reading.check("dataset.")

    @property
    def reading(self) -> Reading:
        """How rows of instructions are read."""
        return Reading(self.template, self.columns, self.turns, self.response_marker)

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

    name: str | None = setting(
        None,
        "a network of README's list, by timm's name; timm:<architecture>, hf:<id or folder>; "
        f"{DECODER}: a language model; {CONVERTED_DECODER}: one always converted from torch; None: "
        "what the config.json of the weights names",
    )
    weights: str = setting(
        "",
        "hub id, .safetensors file, folder, demo:resnet18 or demo:tiny-llama; timm: and hf: may "
        "go without",
    )
    max_length: int | None = setting(
        None,
        "of instructions, in tokens; None: 2048, or the model's limit if it is lower; in mode "
        "official of training and tests only",
    )
    image_size: int | None = setting(
        None, f"side of the images in pixels; None: {PAPER.size}, or the checkpoint's with model"
    )
    transform: str | None = setting(
        None, "paper (bilinear, 256/224) or model (the checkpoint's own); None: by name and mode"
    )
    pooling: str | None = setting(None, f"pooling: {', '.join(POOLINGS)}; None: by mode")
    mean: tuple[float, ...] | None = setting(None, "RGB mean; None: the checkpoint's, by mode")
    std: tuple[float, ...] | None = setting(None, "RGB deviation; None: the checkpoint's, by mode")
    prunable: str | None = setting(
        None, "globs over the checkpoint's names of weights to mask; None: by architecture"
    )
    drop_path: float = setting(0.0, "rate of stochastic depth in fine-tuning, of timm: and hf:")
    dropout: float = setting(0.0, "rate of dropout in fine-tuning, of timm: and hf:")

    def check(self) -> None:
        if not self.weights and not is_converted(self.name):
            raise expect.InputError(
                "encoder.weights: missing; give a hub id such as 'timm/resnet18.tv_in1k', a "
                ".safetensors file or a folder."
            )
        if self.image_size is not None:
            expect.at_least("encoder.image_size", self.image_size, 8)
        if self.transform is not None:
            expect.one_of("encoder.transform", self.transform, TRANSFORMS)
        if self.name in ENCODERS:
            check_pooling(self.name, self.pooling)
        elif self.pooling is not None:
            expect.one_of("encoder.pooling", self.pooling, POOLINGS)
        if self.max_length is not None:
            expect.at_least("encoder.max_length", self.max_length, 2)
        check_rates(self.name, {"drop_path": self.drop_path, "dropout": self.dropout})
        expect.normalisation(self.mean, self.std)

    def for_mode(self, mode: str) -> EncoderConfig:
        """Returns the settings with what name and mode decide of how images are prepared.

        Raises:
          ValueError: a transform that is not the mode's.
        """
        prepares_as_paper = Conventions.of(mode).prepares_as_paper
        if prepares_as_paper and self.transform not in (None, "paper"):
            raise expect.InputError(
                f"encoder.transform: mode {mode!r} prepares images as the paper does; expected "
                f"'paper', got {self.transform!r}."
            )
        if self.name is None and self.transform is None and not prepares_as_paper:
            return self  # the checkpoint names the encoder
        transform = self.transform or default_transform(self.name or "")
        if prepares_as_paper or transform == "paper":
            size = PAPER.size if self.image_size is None else self.image_size
            return dataclasses.replace(self, transform="paper", image_size=size)
        return dataclasses.replace(self, transform=transform)


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Compute, PathSpec):
    """The learning path, how the encoder is masked, and how the probe program runs."""

    tokens_per_batch: int = setting(TOKENS_PER_BATCH, "tokens of instructions per call of it")

    def check(self) -> None:
        PathSpec.check(self)
        Compute.check(self)
        expect.at_least("probe.tokens_per_batch", self.tokens_per_batch, 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, over all processes; the three multiply to their number."""

    data: int = setting(-1, "parts of the samples; -1: all devices that are left")
    probe: int = setting(1, "parts of the masked networks")
    fsdp: int = setting(1, "devices that the weights of a language model are spread over")

    def check(self) -> None:
        if self.data != -1:
            expect.at_least("mesh.data", self.data, 1)
        expect.at_least("mesh.probe", self.probe, 1)
        expect.at_least("mesh.fsdp", self.fsdp, 1)

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
        forms = dict.fromkeys(form for kind in KINDS.values() for form in kind.forms)
        for key, choices in (("forms", forms), ("parts", PARTS)):
            values = getattr(self, key)
            if not values:
                raise expect.InputError(
                    f"export.{key}: expected one or more of {', '.join(choices)}."
                )
            for value in values:
                expect.one_of(f"export.{key}", value, choices)
        if RELEASED in self.forms:
            for key in ("datasets_dir", "released_name"):
                if not getattr(self, key):
                    raise expect.InputError(
                        f"export.{key}: missing; the form {RELEASED!r} needs it. Give the folder "
                        "and the name that the released code knows the data set by, such as /data "
                        "and DTD."
                    )
            check_name(self.released_name or "")
            expect.one_of("export.pretrain", self.pretrain, PRETRAINS)
