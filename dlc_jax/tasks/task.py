"""What the stages ask of a kind of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from dlc_jax.config import Config
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation import Mmlu
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.plan import Plan
from dlc_jax.selection import Cell
from dlc_jax.tasks.exports import ExportStep
from dlc_jax.training.loop import Trainer
from dlc_jax.tuning import FinetuneTrials
from dlc_jax.types import Selection
from dlc_jax.workspace import Workspace


@runtime_checkable
class Samples(Protocol):
    """A data set of any kind.

    Attributes:
      ids: [n] stable names, unique.
      name: Name of the source.
      fingerprint: SHA-256 over all that scores and training depend on.
    """

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...


class Training(NamedTuple):
    """What the stage `finetune` trains, and on what.

    Attributes:
      data: Training data.
      fingerprint: SHA-256 over the encoder or model before training.
      make_trainer: Makes what trains; called once nothing else can go wrong.
      settings: Settings and fingerprints for the record of the stage.
      facts: Returns what else the record holds; called after training.
    """

    data: Samples
    fingerprint: str
    make_trainer: Callable[[], Trainer[Any]]
    settings: dict[str, Any]
    facts: Callable[[], dict[str, Any]]


@runtime_checkable
class Task(Protocol):
    """A kind of data with the settings of a run; a data set is loaded once.

    Attributes:
      easiest_hardest: File that shows them, below the work directory.
      left_out: Noun phrase for samples that were left out when the others were scored.
      encoder_settings: Settings of `encoder` that decide the scores of this kind of data, beside
        the weights.
    """

    easiest_hardest: str
    left_out: str
    encoder_settings: tuple[str, ...]

    def encoder_fingerprint(self) -> str:
        """Returns the SHA-256 over the encoder or model as it is scored with."""

    def load(self, source: str, /) -> Samples:
        """Returns a data set by its source."""

    def check(self, workspace: Workspace, /) -> None:
        """Raises ValueError for mistakes in later stages, before a scoring pass is spent."""

    def score(self, workspace: Workspace, /) -> Config:
        """Scores what is not scored yet; returns the configuration as the encoder resolves it."""

    def exports(self, kept: Mapping[Cell, Selection], root: Path, /) -> Iterable[ExportStep]:
        """Returns the exports asked for, in the work directory `root`."""

    def training(self, workspace: Workspace, /) -> Training:
        """Returns what is fine-tuned, loaded in all processes."""

    def plan(self, mesh: MeshSize, /) -> Plan:
        """Returns what a run on these devices takes of devices, hosts and time."""


@runtime_checkable
class TunedTask(Task, Protocol):
    """A kind of data that has the stage `tune`."""

    def trials(self, workspace: Workspace, ids: np.ndarray, /) -> FinetuneTrials:
        """Returns what fine-tunes on subsets of the samples of these ids, in one process.

        Raises:
          ValueError: the data are not those that were scored.
        """


@runtime_checkable
class EvaluatedTask(Task, Protocol):
    """A kind of data that has the stage `evaluate`; model and questions are loaded once.

    Attributes:
      model: What adapters are trained for, over all devices of all processes.
      questions: What the stage asks.
    """

    @property
    def model(self) -> LanguageModel: ...
    @property
    def questions(self) -> Mmlu: ...


Loaded = TypeVar("Loaded")


class Sources(Generic[Loaded]):
    """Data sets by source, loaded once: stages share them and their fingerprints.

    Args:
      read: Loads a data set, in one process.
      agree: Raises ValueError unless all processes see the same samples.
    Attributes:
      load: Returns a data set in one process.
      load_together: Returns a data set in all processes, which must see the same samples.
    """

    def __init__(self, read: Callable[[str], Loaded], agree: Callable[[Loaded], None]):
        load = functools.cache(read)

        def together(source: str) -> Loaded:
            data = load(source)
            agree(data)
            return data

        self.load: Callable[[str], Loaded] = load
        self.load_together: Callable[[str], Loaded] = functools.cache(together)
