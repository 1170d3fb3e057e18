"""Kinds of data: which stages, scores and forms of export each has, and settings it has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dlc_jax import expect
from dlc_jax.encoders import ENCODERS
from dlc_jax.encoders.converted import CONVERTED, is_converted
from dlc_jax.encoders.language_model import CONVERTED_DECODER, DECODER
from dlc_jax.exports import EXPORTS, RELEASED, Export
from dlc_jax.exports.instructions import INSTRUCTION_EXPORTS, InstructionExport


@dataclasses.dataclass(frozen=True)
class DataKind:
    """A kind of data, and what there is for it.

    Attributes:
      name: Plural noun for messages.
      encoders: Values of `encoder.name` that stand for it.
      stages: Stages, in the order in which they run.
      training: Section of the settings that the stage `finetune` uses.
      needs_test: Whether fine-tuning needs a test set.
      measures: Sources of scores and of inputs of selectors: `losses` of probes, `encoder`
        (features), `training` (a record of it), `responses`.
      forms: Forms of export; None stands for one that chooses all of its paths.
      only: Settings that have one value here, by their dotted names: the value, and why.
      released: The released code that mode `official` follows, as in `Conventions.of`.
    """

    name: str
    encoders: tuple[str, ...]
    stages: tuple[str, ...]
    training: str
    needs_test: bool
    measures: frozenset[str]
    forms: Mapping[str, Export | InstructionExport | None]
    only: Mapping[str, tuple[Any, str]]
    released: str = "images"


_NO_COLUMN = "instructions have no such column, their classes come from dataset.category"
_KINDS = (
    DataKind(
        name="images",
        encoders=tuple(ENCODERS),
        stages=("plan", "score", "tune", "select", "export", "finetune", "report"),
        training="finetune",
        needs_test=True,
        measures=frozenset({"losses", "encoder", "training"}),
        forms={**EXPORTS, RELEASED: None},
        only={
            "mesh.fsdp": (1, "spreads the weights of a language model"),
            "dataset.columns": (None, "images have image_column and label_column"),
            "dataset.turns": ("last", "images have no turns"),
            "dataset.response_marker": (None, "images have no responses"),
        },
    ),
    DataKind(
        name="instructions",
        encoders=(DECODER, CONVERTED_DECODER),
        stages=("plan", "score", "select", "export", "finetune", "evaluate", "report"),
        training="lora",
        needs_test=False,
        measures=frozenset({"losses", "encoder", "responses"}),
        forms=INSTRUCTION_EXPORTS,
        released="instructions",
        only={
            "dataset.image_column": (None, _NO_COLUMN),
            "dataset.label_column": (None, _NO_COLUMN),
            "selection.second_encoder": (None, "instructions are measured by one model"),
            "encoder.prunable": (None, "all linear layers of a model's blocks are masked"),
            "encoder.drop_path": (0.0, "LoRA of language models has none"),
            "encoder.dropout": (0.0, "that of language models is lora.dropout"),
            "probe.augment": (False, "instructions have no crops"),
            "selection.leave_out_suspects": (
                False,
                "labels are suspect where another class's prototype is nearer, and responses have "
                "no prototypes",
            ),
            "mesh.probe": (
                1,
                "the masked copies of a language model are not divided among devices; its weights "
                "are, by mesh.fsdp",
            ),
        },
    ),
)
KINDS: Mapping[str, DataKind] = {kind.name: kind for kind in _KINDS}


def data_kind_of(encoder_name: str | None) -> DataKind:
    """Returns the kind of data that an encoder is for; None: images.

    Raises:
      ValueError: an unknown encoder.
    """
    if encoder_name is None or is_converted(encoder_name):
        return KINDS["images"]
    kinds = {name: kind for kind in KINDS.values() for name in kind.encoders}
    expect.one_of("encoder.name", encoder_name, [*kinds, *(f"{how}..." for how in CONVERTED)])
    return kinds[encoder_name]
