"""Training on subsets and testing on held-out samples: cheap by linear heads, or in earnest."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32, Int64

from dlc_jax import checks
from dlc_jax.distributed import Run
from dlc_jax.encoders import Encoder
from dlc_jax.files import array_files
from dlc_jax.files.array_files import Expected
from dlc_jax.preprocess import Images
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.tuning.linear import LinearProbeConfig, linear_probes
from dlc_jax.types import Conventions, Dataset
from dlc_jax.workspace import artefacts

_OUTCOME = {
    "predictions": Expected("i", 1),
    "seconds": Expected("f", 0),
    "inputs": Expected("U", 0),
}
TRIALS = ("linear_probe", "finetune")


class Trial(NamedTuple):
    """A subset to train on.

    Attributes:
      positions: In the whole training set, ascending.
      seed: Of head, data order and augmentation.
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
        ...


class LinearTrials:
    """Linear heads on features of the frozen encoder, all in one program.

    Args:
      features: [n, d] of the whole training set.
      labels: [n] class ids.
      settings: How the heads are trained.
      mode, mesh: See `linear_probes`.
    """

    name = "linear_probe"

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        settings: LinearProbeConfig = LinearProbeConfig(),
        mode: str = "default",
        mesh: Mesh | None = None,
    ):
        checks.features_fit_labels("features", features, labels)
        self._features, self._labels = features, labels
        self._settings, self._mode, self._mesh = settings, mode, mesh

    def __call__(
        self, trials: Sequence[Trial], held_out: Int64[np.ndarray, " v"], /
    ) -> Bool[np.ndarray, "k v"]:
        return linear_probes(
            self._features,
            self._labels,
            [trial.positions for trial in trials],
            val_features=self._features[held_out],
            val_labels=self._labels[held_out],
            seeds=[trial.seed for trial in trials],
            settings=self._settings,
            mode=self._mode,
            mesh=self._mesh,
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
        checks.is_a(FinetuneConfig, settings=settings)
        checks.is_a(Run, run=run)
        # a held-out image is found by its position, so that none may be missing
        self._images = dataclasses.replace(Images.of(images, image_size), on_corrupt="error")
        self._encoder, self._dataset = encoder, self._images.dataset
        self._settings, self._conventions, self._run = settings, Conventions.of(mode), run
        self.earlier_seconds = 0.0
        self._counted: set[Path] = set()  # outcomes whose seconds are known

    @functools.cached_property
    def _finetuner(self) -> Finetuner:
        """Tests on all samples, so that images are decoded once for all repeats."""
        return self._finetuner_on(self._dataset)

    def _finetuner_on(self, test: Dataset | None) -> Finetuner:
        return Finetuner(
            self._encoder, self._images, test, self._settings, self._conventions, self._run
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides how trials end, but for what is kept."""
        return self._finetuner_on(None).fingerprint  # decodes nothing

    def __call__(
        self, trials: Sequence[Trial], held_out: Int64[np.ndarray, " v"], /
    ) -> Bool[np.ndarray, "k v"]:
        labels = self._dataset.labels[held_out]
        return np.stack([self._predictions(trial)[held_out] == labels for trial in trials])

    def _predictions(self, trial: Trial) -> Int32[np.ndarray, " n"]:
        path, inputs = self._run.path, ""
        if path is not None:
            inputs = self._finetuner.inputs(trial.positions, trial.seed)
            path /= f"{inputs[:32]}.npz"
            found = self._known(path, inputs)
            if found is not None:
                return found
        start = time.perf_counter()
        predictions = self._finetuner.run(trial.positions, trial.seed).predictions
        assert predictions is not None  # there is a test set
        if path is not None:
            self._counted.add(path)
            with artefacts.atomic(path) as file:
                seconds = np.array(time.perf_counter() - start)
                outcome = {"predictions": predictions, "seconds": seconds}
                np.savez(file, allow_pickle=False, inputs=np.array(inputs), **outcome)
        return predictions

    def _known(self, path: Path, inputs: str) -> Int32[np.ndarray, " n"] | None:
        """Returns the predictions of this very trial; None where it has to be run."""
        if not path.exists():
            return None
        try:
            found = array_files.read_npz(path, _OUTCOME)
            if str(found["inputs"]) != inputs or len(found["predictions"]) != len(self._dataset):
                raise checks.InputError(
                    f"of inputs {str(found['inputs'])[:12]}, expected {inputs[:12]}"
                )
        except checks.InputError as error:
            print(f"note: {path}: damaged, the trial is run again: {error}")
            return None
        self.earlier_seconds += 0.0 if path in self._counted else float(found["seconds"])
        self._counted.add(path)
        return found["predictions"]
