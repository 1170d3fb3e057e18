"""What probing, recording, selecting, tuning and fine-tuning hand on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from dlc_jax import expect


def way(method: str, split: float | None) -> str:
    """Returns a method as tables and figures name it."""
    return method if split is None else f"{method} (split {split:g})"


class Gap(NamedTuple):
    """A difference in accuracy with what is known of it.

    Attributes:
      mean: In percentage points; positive is better.
      half_width: Half the width of the 95 % interval, in points.
      p_value: One-sided: how likely a gap so large is where there is none.
    """

    mean: float
    half_width: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"


class Tried(NamedTuple):
    """What a way of choosing came to on validation data at a keep fraction.

    Attributes:
      accuracy: Validation accuracy in percent.
      to_random: Gap to random pruning at the same keep fraction.
      to_full: Gap to training on everything.
      to_even: Gap to FlexRand at split 0.5; None for other methods.
    """

    keep_fraction: float
    method: str
    split: float | None
    accuracy: float
    to_random: Gap
    to_full: Gap
    to_even: Gap | None

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return way(self.method, self.split)


class Choice(NamedTuple):
    """What to do at a keep fraction.

    Attributes:
      method, split: What `auto` stands for.
      why: A sentence.
    """

    keep_fraction: float
    method: str
    split: float | None
    why: str

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return way(self.method, self.split)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` found on validation parts of the training data.

    Attributes:
      tried: Every way of choosing at every keep fraction.
      methods: What method "auto" stands for, one per keep fraction, ascending.
      splits: What split "auto" stands for, likewise.
      full_accuracy: Accuracy of training on everything, in percent.
      trained: `linear_probe` or `finetune`.
      num_repeats: Validation splits.
      min_per_class: Least samples that were to be kept of a class.
      scores_fingerprint: SHA-256 of the scores and labels it was made from.
      features_fingerprint: SHA-256 of the features; None where there were none.
      seconds: Time of everything.
    """

    tried: tuple[Tried, ...]
    methods: tuple[Choice, ...]
    splits: tuple[Choice, ...]
    full_accuracy: float
    trained: str
    num_repeats: int
    min_per_class: int
    scores_fingerprint: str
    features_fingerprint: str | None
    seconds: float

    def choice(self, keep_fraction: float, *, of: str = "methods") -> Choice:
        """Returns what to do at a keep fraction.

        Args:
          keep_fraction: One that was tuned.
          of: `methods`, or `splits` for FlexRand's alone.
        Raises:
          ValueError: it was not tuned.
        """
        choices: tuple[Choice, ...] = getattr(self, of)
        for choice in choices:
            if math.isclose(choice.keep_fraction, keep_fraction, abs_tol=1e-9):
                return choice
        if not choices:
            raise expect.InputError("split: 'auto' was not tuned; expected flexrand in methods.")
        tuned = ", ".join(f"{choice.keep_fraction:g}" for choice in choices)
        raise expect.InputError(
            f"keep_fraction: {keep_fraction!r} was not tuned; tuned are {tuned}. Give it to "
            "tune(..., keep_fractions=...)."
        )

    def row(self, keep_fraction: float, method: str, split: float | None) -> Tried:
        """Returns what a way of choosing came to; KeyError if it was not tried."""
        return {row[:3]: row for row in self.tried}[keep_fraction, method, split]


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeLosses:
    """What the probes measured: one loss per masked network and sample.

    Attributes:
      losses: [m, n] cross-entropy in nats; higher is harder.
      sparsity: [m] share of the prunable weights that each probe zeroes, ascending.
      labels: [n] class ids.
      ids: [n] sample ids, in the scored order.
      prototypes: [c, d] class means of the unmasked features.
      class_names: One name per class.
      skipped: Samples that could not be decoded and were left out (`on_corrupt="skip"`), id: why.
      steps: [m] which steps of the path the probes are, from 0; None: not known.
      num_steps: All that the path has.
    """

    losses: Float32[np.ndarray, "m n"]
    sparsity: Float32[np.ndarray, " m"]
    labels: Int32[np.ndarray, " n"]
    ids: np.ndarray
    prototypes: Float32[np.ndarray, "c d"]
    class_names: tuple[str, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: Int64[np.ndarray, " m"] | None = None
    num_steps: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseLosses:
    """How well a language model, not masked, predicts responses.

    Attributes:
      losses: [n] mean cross-entropy per token of the response given its prompt, in nats.
      alone: [n] the same without the prompt.
      num_tokens: [n] tokens of the response.
      ids: [n] sample ids.
      after_prefix: [n] mean cross-entropy with only `### Response:` before the response; None where
        it was not measured.
    """

    losses: Float32[np.ndarray, " n"]
    alone: Float32[np.ndarray, " n"]
    num_tokens: Int64[np.ndarray, " n"]
    ids: np.ndarray
    after_prefix: Float32[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRecord:
    """What fine-tuning on a whole data set showed of every sample.

    Attributes:
      correct: [e, n] whether a sample was classified right when it came up in an epoch of the first
        run: in training mode, on the augmented view that it was trained on.
      logits: [n, c] after the last epoch of the first run, evaluation mode, evaluation crops.
      early_logits: [r, n, c] the same after the early epoch of each of r runs.
      early_squared_norms: [r, n] squared norm of the last layer's input there. GraNd needs no more
        of the features, so memory stays O(n).
      early_epoch: Epoch, from 1, after which the early ones were taken.
      batch_size: Samples per training step.
      labels: [n] class ids.
      ids: [n] sample ids.
      class_names: One name per class.
      seconds: All that it took: training and recording, of interrupted runs too.
      num_epochs: Epochs trained by all runs together.
      skipped: Samples that could not be decoded and were left out (`on_corrupt="skip"`), id: why.
    """

    correct: Bool[np.ndarray, "e n"]
    logits: Float32[np.ndarray, "n c"]
    early_logits: Float32[np.ndarray, "r n c"]
    early_squared_norms: Float32[np.ndarray, "r n"]
    early_epoch: int
    batch_size: int
    labels: Int32[np.ndarray, " n"]
    ids: np.ndarray
    class_names: tuple[str, ...]
    seconds: float
    num_epochs: int
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def probabilities(self) -> Float32[np.ndarray, "n c"]:
        """Softmax of `logits`."""
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """A kept subset.

    Attributes:
      indices: Kept positions in the scored order, int64, ascending.
      method: Name of the selector.
      keep_fraction: Fraction kept, in (0, 1).
      split: FlexRand's gamma, the share of a class that counts as easy, or `auto`; None for other
        methods.
      seed: Seed of the draw.
      mode: `default` or `official`.
      num_kept_per_class: [c] kept samples of each class.
      single_sample_classes: Class ids that have one sample only (kept, in default mode and where
        classes are selected from one by one).
      min_per_class: Least samples that were to be kept of a class.
      variant: The method's: `published`, or `deepcore` with that library's slip.
      allocation: How the total was shared among classes: `proportional` or `nucs`.
      per_class: Whether each class was selected from; False: all samples as one group.
      chosen: What `auto` stood for; None where it was not asked for.
      labels_fingerprint: SHA-256 of all labels it was selected from; None if not known.
      ids: Kept sample ids, in the order of `indices`; None where `select` was not given any.
      scored_ids: [n] ids of all samples it was selected from, in their order; None likewise.
    """

    indices: Int64[np.ndarray, " kept"]
    method: str
    keep_fraction: float
    split: float | str | None
    seed: int
    mode: str
    num_kept_per_class: Int64[np.ndarray, " c"]
    single_sample_classes: tuple[int, ...] = ()
    min_per_class: int = 0
    variant: str = "published"
    allocation: str = "proportional"
    per_class: bool = True
    chosen: Choice | None = None
    labels_fingerprint: str | None = None
    ids: np.ndarray | None = dataclasses.field(default=None, repr=False)
    scored_ids: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.indices)


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
    """What a fine-tuning run ended with.

    Attributes:
      test_accuracy: Percent, after the last epoch, never the best one; None without a test set.
      per_class_accuracy: [c] in percent; NaN for a class without test samples; None likewise.
      predictions: [n] predicted class of every test sample that could be read; None likewise.
      num_kept: Training samples.
      absent_classes: Names of classes that no kept training sample has.
      history: One dictionary per epoch: epoch, learning_rate, train_loss (nats), train_accuracy
        (percent), images_per_s (compilation counts), elapsed_s, and test_accuracy where it was
        measured.
      weights: `{"encoder": ..., "head": {"kernel": [d, c], "bias": [c]}}` after the last epoch;
        float32; the encoder's part is what `Encoder.params` takes.
      seconds: Time of all epochs, those of interrupted runs too.
      skipped_test: Test samples left out as unreadable (`on_corrupt="skip"`), id: why.
    """

    test_accuracy: float | None
    per_class_accuracy: Float64[np.ndarray, " c"] | None
    predictions: Int32[np.ndarray, " n"] | None = dataclasses.field(repr=False)
    num_kept: int
    absent_classes: tuple[str, ...]
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    weights: dict[str, Any] = dataclasses.field(repr=False)
    seconds: float
    skipped_test: dict[str, str] = dataclasses.field(default_factory=dict)
