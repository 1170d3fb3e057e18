"""Training on subsets and testing on held-out samples: cheap by linear heads, or in earnest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32, Int64

from dlc_jax import expect
from dlc_jax.distributed import Run
from dlc_jax.encoders import Encoder
from dlc_jax.files import array_files
from dlc_jax.preprocess.images import Images
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.loop import key_of_run, train
from dlc_jax.tuning.linear import LinearProbeConfig, linear_probes
from dlc_jax.types import Conventions, Dataset
from dlc_jax.workspace import Workspace, Written, artefacts, records

TRIALS = ("linear_probe", "finetune")


class Trial(NamedTuple):
    """A subset to train on.

    Attributes:
      positions: In the whole training set, ascending.
      seed: Seed of head, data order and augmentation.
    """

    positions: Int64[np.ndarray, " _"]
    seed: int


@runtime_checkable
class Trials(Protocol):
    """Trains on subsets, and tests on samples that are in none of them."""

    name: str

    def __call__(
        self, trials: Sequence[Trial], held_out: Int64[np.ndarray, " v"], /
    ) -> Bool[np.ndarray, "k v"]:
        """Returns whether trial k classifies each held-out sample right."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearTrials:
    """Linear heads on features of the frozen encoder, all in one program.

    Attributes:
      features: [n, d] features of the whole training set.
      labels: [n] class ids.
      settings: How the heads are trained.
      mesh: See `linear_probes`.
    """

    features: np.ndarray
    labels: np.ndarray
    settings: LinearProbeConfig
    mesh: Mesh | None

    name = "linear_probe"

    def __call__(
        self, trials: Sequence[Trial], held_out: Int64[np.ndarray, " v"], /
    ) -> Bool[np.ndarray, "k v"]:
        return linear_probes(
            self.features,
            self.labels,
            [trial.positions for trial in trials],
            val_features=self.features[held_out],
            val_labels=self.labels[held_out],
            seeds=[trial.seed for trial in trials],
            settings=self.settings,
            mesh=self.mesh,
        ).correct


class FinetuneTrials:
    """Fine-tuning of the whole encoder, one trial after the other.

    Args:
      encoder, images, settings, image_size, mode: See `finetune`. An unreadable image is always an
        error.
      run: Folder, devices of this process, and bars; see `Run`. The folder keeps the outcome of
        every trial, so that none is run twice.
    Attributes:
      earlier_seconds: What trials took whose outcome was found there.
    """

    name = "finetune"

    def __init__(
        self,
        encoder: Encoder,
        images: Images | Dataset,
        settings: FinetuneConfig = FinetuneConfig(),
        *,
        image_size: int | None = None,
        mode: str = "default",
        run: Run = Run(),
    ):
        expect.is_a(FinetuneConfig, settings=settings)
        expect.is_a(Run, run=run)
        # a held-out image is found by its position, so that none may be missing
        images = dataclasses.replace(Images.of(images, image_size), on_corrupt="error")
        self._dataset, self._run, conventions = images.dataset, run, Conventions.of(mode)
        self._tested_on = lambda test: Finetuner(encoder, images, test, settings, conventions, run)
        self.earlier_seconds = 0.0
        self._counted: set[str] = set()  # outcomes whose seconds are known

    @functools.cached_property
    def _finetuner(self) -> Finetuner:
        """Tests on all samples, so that images are decoded once for all repeats."""
        return self._tested_on(self._dataset)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides how trials end, but for what is kept."""
        return self._tested_on(None).fingerprint  # decodes nothing

    def __call__(
        self, trials: Sequence[Trial], held_out: Int64[np.ndarray, " v"], /
    ) -> Bool[np.ndarray, "k v"]:
        labels = self._dataset.labels[held_out]
        return np.stack([self._predictions(trial)[held_out] == labels for trial in trials])

    def _predictions(self, trial: Trial) -> Int32[np.ndarray, " n"]:
        step = _TrialStep(self._finetuner, trial)
        if self._run.path is None:
            return step.compute(None)
        workspace = Workspace(self._run.path)
        if (made := workspace.ensure(step)) is not None:
            self._counted.add(step.name)
            return made.value
        record = records.read(workspace.root, step.name)
        if record is not None and step.name not in self._counted:
            self.earlier_seconds += record.seconds
            self._counted.add(step.name)
        return array_files.read_npy(workspace.root / step.files[0])


@dataclasses.dataclass(frozen=True, eq=False)
class _TrialStep:
    """Predictions of a model that was fine-tuned on a subset, for every sample, [n]."""

    finetuner: Finetuner
    trial: Trial

    kind = Finetuner.kind
    stage = "tune"
    settings: ClassVar[Mapping[str, Any]] = {}
    obsolete = ()

    @property
    def key(self) -> dict[str, Any]:
        return key_of_run(self.finetuner.fingerprint, *self.trial)

    @property
    def name(self) -> str:
        return f"trials/{artefacts.json_hash(self.key)[:32]}"

    @property
    def files(self) -> tuple[str, ...]:
        return (f"{self.name}.npy",)

    def compute(self, scratch: Path | None) -> Int32[np.ndarray, " n"]:
        predictions = train(self.finetuner, self.trial.positions, self.trial.seed).predictions
        assert predictions is not None  # there is a test set
        return predictions

    def write(self, root: Path, predictions: Int32[np.ndarray, " n"]) -> Written:
        with artefacts.atomic(root / self.files[0]) as file:
            np.save(file, predictions, allow_pickle=False)
        return Written(self.files)
