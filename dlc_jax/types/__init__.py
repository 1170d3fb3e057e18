"""What one stage hands to the next, settings as dataclasses, and the letters of array axes.

Axis glossary: n samples, d features, c classes, m probes (masked networks), b batch, t tokens,
v vocabulary; h, w and s are image height, width and side in pixels.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import math
import numbers
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Integer

from dlc_jax import expect
from dlc_jax.files.image_files import depth

Params = Any  # a pytree of arrays


class Deferred(abc.ABC):
    """A leaf of `Params` that is computed where it is used; a pytree of what it is made of."""

    @abc.abstractmethod
    def computed(self) -> jax.Array:
        """Returns the parameter."""


def computed(params: Params) -> Params:
    """Returns the parameters with deferred leaves computed."""

    def is_deferred(part: Any) -> bool:
        return isinstance(part, Deferred)

    return jax.tree.map(
        lambda leaf: leaf.computed() if is_deferred(leaf) else leaf, params, is_leaf=is_deferred
    )


def path_name(path: tuple) -> str:
    """Returns `layer1/0/conv1/kernel` for the key path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(params: Params) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


KEEP_FRACTIONS = tuple(k / 10 for k in range(1, 10))  # the paper's
Settings = TypeVar("Settings")


def setting(default: Any, doc: str) -> Any:
    """Returns a dataclass field of a configuration, with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def overridden(settings: Settings, **values: Any) -> Settings:
    """Returns the settings, a dataclass, with those of these values that are not None."""
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(settings, **given) if given else settings  # type: ignore[type-var]


def as_tuple(value: Any) -> Any:
    """Returns an array, a list or one number or text as a tuple; anything else as it is."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, numbers.Real)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What `mode` decides: the paper's way, or the released code's where that differs.

    Defaults are those of mode `default`.

    Attributes:
      mode: `default` or `official`.
      schedule: The learning path's, where none is asked for (Q1).
      pooling: How a ViT's tokens become features, where nothing is asked for (Q2).
      deep_images: What becomes of more than 8 bits a channel, where nothing is asked for.
      num_runs: Runs of a training record, where no number is asked for.
      imagenet_normalised: Whether every encoder takes ImageNet's mean and deviation (Q11).
      prepares_as_paper: Whether images are scaled and cropped as in the paper for every encoder.
      ties_as_torch: Whether torch's order decides between equally small weights.
      floors_milestones: Whether the learning rate falls after whole epochs only (Q6).
      draws_as_released: Whether samples are rounded, drawn and sorted as the released code does it,
        which knows nothing of ids.
      released: The released code that it follows, of `images` or `instructions`.
      reads_as_released: Whether instructions are read and masked as the released code does it.
      splits, keep_fractions: The only ones it has, in the order in which it draws: all keep
        fractions of one split after the other.
    """

    mode: str = "default"
    schedule: str = "linear"
    pooling: str = "mean"
    deep_images: str = "error"
    num_runs: int = 3
    imagenet_normalised: bool = False
    prepares_as_paper: bool = False
    ties_as_torch: bool = False
    floors_milestones: bool = True
    draws_as_released: bool = False
    released: str = "images"
    reads_as_released: bool = False
    splits: tuple[float, ...] = ()
    keep_fractions: tuple[float, ...] = ()

    @classmethod
    def of(cls, mode: str, kind: str = "images") -> Conventions:
        """Returns the conventions of that name; ValueError if there are none.

        Args:
          mode: `default` or `official`.
          kind: `images` or `instructions`, for which the authors released code apart.
        """
        expect.one_of("mode", mode, _CONVENTIONS)
        expect.one_of("kind", kind, _CONVENTIONS[mode])
        return _CONVENTIONS[mode][kind]


_BY_DEFAULT = Conventions()
_CONVENTIONS = {
    "default": {"images": _BY_DEFAULT, "instructions": _BY_DEFAULT},
    "official": {
        "images": Conventions(
            mode="official",
            schedule="geometric",
            pooling="scalar",
            deep_images="clip",
            num_runs=10,
            imagenet_normalised=True,
            prepares_as_paper=True,
            ties_as_torch=True,
            floors_milestones=False,
            draws_as_released=True,
            splits=tuple(0.05 * i for i in range(1, 20)),
            keep_fractions=tuple(j / 10 for j in range(1, 10)),
        ),
        "instructions": Conventions(
            mode="official",
            released="instructions",
            reads_as_released=True,
            ties_as_torch=True,
            draws_as_released=True,
            splits=(0.25, 0.75),
            keep_fractions=(0.5,),
        ),
    },
}


def labels_fingerprint(labels: Integer[np.ndarray, " n"]) -> str:
    """Returns the SHA-256 of labels in their order."""
    return hashlib.sha256(np.ascontiguousarray(labels, np.int32).tobytes()).hexdigest()


def scores_fingerprint(scores: np.ndarray, labels: Integer[np.ndarray, " n"]) -> str:
    """Returns the SHA-256 of scores, as float32, and labels in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(scores, np.float32).tobytes())
    digest.update(labels_fingerprint(labels).encode())
    return digest.hexdigest()


def features_fingerprint(features: np.ndarray) -> str:
    """Returns the SHA-256 of features, as float32, in the order of their rows."""
    return hashlib.sha256(np.ascontiguousarray(features, np.float32).tobytes()).hexdigest()


DEEP_IMAGES = ("error", "full_range", "min_max", "clip")
ROWS_OF_DIGEST = 1024  # samples that one digest is of


@runtime_checkable
class ImageSource(Protocol):
    """Random access to images, each still encoded (JPEG, PNG, ...) or decoded to uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> bytes | np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Some:
    """A part of a source."""

    images: ImageSource
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> bytes | np.ndarray:
        return self.images[int(self.positions[position])]

    def file(self, position: int) -> Path | None:
        return file_of(self.images, int(self.positions[position]))


def file_of(images: ImageSource, position: int) -> Path | None:
    """Returns the file that holds this image alone; None where the source has no such files."""
    file = getattr(images, "file", None)
    return None if file is None else file(position)


class Sample(NamedTuple):
    """One labelled image.

    Attributes:
      image: Encoded bytes, or uint8 [h, w, 3], [h, w, 1] or [h, w]; other numbers by
        `Dataset.deep_images`.
      label: Class id in [0, c).
      id: Stable name of the sample, unique in its data set.
    """

    image: bytes | np.ndarray
    label: int
    id: str


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images behind random access: `dataset[i]` is a `Sample`.

    Attributes:
      images: Anything with `len` and integer indexing that gives encoded bytes or uint8 arrays.
      labels: [n] class ids in [0, c); any integers, kept as int32.
      ids: [n] stable names, unique; kept as text.
      class_names: One name per class, in label order.
      name: What the data set was loaded from, for messages.
      label_table: Original integer label -> class id, where the source's labels were not 0..c-1.
      deep_images: How more than 8 bits a channel become 8. `error`: not at all, such an image is
        refused; `full_range`: integers are divided by the largest value of their stored bits (of
        signed ones, which must not be negative, the largest positive one), floats lie in 0..1;
        `min_max`: the smallest value of an image becomes 0, the largest 255, over all channels, and
        a constant image mid-grey; `clip`: as Pillow does, where greys above 255 are white.
      mid_grey: Ids of the constant images among those decoded so far, under `min_max`.
      left_out: Suffix (lower case, with its dot) -> files beside the samples that nobody reads.
      empty_classes: Names that the source declares and has no sample of; they are not in
        `class_names`.
    Raises:
      ValueError: lengths that differ, a label outside [0, c), a duplicate id, or another value of
        `deep_images`.
    """

    images: ImageSource
    labels: Integer[np.ndarray, " n"]
    ids: np.ndarray
    class_names: tuple[str, ...]
    name: str = "arrays"
    label_table: dict[int, int] | None = None
    deep_images: str = "error"
    mid_grey: set[str] = dataclasses.field(default_factory=set, repr=False)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    empty_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect.one_of("deep_images", self.deep_images, DEEP_IMAGES)
        labels, ids = np.asarray(self.labels), expect.as_ids(self.name, self.ids)
        expect.dataset_is_consistent(self.name, len(self.images), labels, ids, self.class_names)
        object.__setattr__(self, "labels", labels.astype(np.int32))
        object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Sample:
        position = range(len(self))[position]
        return Sample(self.images[position], int(self.labels[position]), str(self.ids[position]))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, positions: Integer[np.ndarray, " k"]) -> Dataset:
        """Returns the samples at these positions, with all classes; nothing is read yet.

        Raises:
          ValueError: a position is out of range or repeated, or there is none.
        """
        positions = np.asarray(positions)
        expect.positions("subset", positions, len(self))
        return dataclasses.replace(
            self,
            images=_Some(self.images, positions),
            labels=self.labels[positions],
            ids=self.ids[positions],
        )

    def without_empty_classes(self) -> Dataset:
        """Returns the data set without the classes that have no sample; the others move up.

        `label_table` has the class ids that there were before, if there are such classes, and
        `empty_classes` their names.
        """
        present = np.unique(self.labels)
        if len(present) == self.num_classes:
            return self
        moved = {int(old): new for new, old in enumerate(present)}
        table = self.label_table or {old: old for old in moved}
        empty = [name for j, name in enumerate(self.class_names) if j not in moved]
        return dataclasses.replace(
            self,
            labels=np.searchsorted(present, self.labels),
            class_names=tuple(self.class_names[j] for j in moved),
            label_table={key: moved[old] for key, old in table.items() if old in moved},
            empty_classes=(*self.empty_classes, *empty),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id, label, image and class name: equal content, equal fingerprint.

        So is `deep_images`, of images that it makes other pixels of.
        """
        return self.fingerprint_of(self.digests(range(self.num_blocks)))

    @property
    def num_blocks(self) -> int:
        """How many digests the fingerprint is made of."""
        return -(-len(self) // ROWS_OF_DIGEST)

    def fingerprint_of(self, digests: Sequence[str]) -> str:
        """Returns the fingerprint, made of the digests of all blocks."""
        return hashlib.sha256("".join([repr(self.class_names), *digests]).encode()).hexdigest()

    def digests(self, blocks: Sequence[int]) -> list[str]:
        """Returns the SHA-256 of blocks of samples, which are read for it."""
        found = []
        with ThreadPoolExecutor() as pool:
            for start in (block * ROWS_OF_DIGEST for block in blocks):
                rows = range(start, min(start + ROWS_OF_DIGEST, len(self)))
                digest = hashlib.sha256(b"".join(pool.map(self.row_digest, rows)))
                found.append(digest.hexdigest())
        return found

    def row_digest(self, position: int) -> bytes:
        """Returns the SHA-256 of one sample: id, label and image."""
        head = f"{self.ids[position]}\0{self.labels[position]}\0"
        digest = hashlib.sha256(head.encode())
        try:
            image = self.images[position]
        except OSError as error:  # whether that matters is for the decoder to say
            image = type(error).__name__.encode()
        if isinstance(image, np.ndarray):
            digest.update(repr(image.shape).encode())
            if depth(image):  # the same bytes may be other numbers
                digest.update(image.dtype.str.encode())
        if self.deep_images != "error" and depth(image):
            digest.update(self.deep_images.encode())
        digest.update(image.tobytes() if isinstance(image, np.ndarray) else image)
        return digest.digest()


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
      nearest: [m, n] class whose prototype is nearest; None: not known, as of instructions.
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
    nearest: Int32[np.ndarray, "m n"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseLosses:
    """How well a language model, not masked, predicts responses.

    Attributes:
      losses: [n] mean cross-entropy per token of the response given its prompt, in nats.
      alone: [n] the same without the prompt; None where responses have several turns.
      num_tokens: [n] tokens of the response.
      ids: [n] sample ids.
      after_prefix: [n] mean cross-entropy with only `### Response:` before the response; None where
        it was not measured.
      changes: [n] arrays: how much the prompt adds to the loss of each token of the response that
        has one without it, in nats, below 0 where it helps; None where it was not measured.
      features: [n, d] embeddings, see `dlc.response_features`; None where they were not measured.
    """

    losses: Float32[np.ndarray, " n"]
    alone: Float32[np.ndarray, " n"] | None
    num_tokens: Int64[np.ndarray, " n"]
    ids: np.ndarray
    after_prefix: Float32[np.ndarray, " n"] | None = None
    changes: tuple[Float32[np.ndarray, " _"], ...] | None = dataclasses.field(
        default=None, repr=False
    )
    features: Float32[np.ndarray, "n d"] | None = dataclasses.field(default=None, repr=False)


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
      max_similarity: Cosine above which near-duplicates were left out; None: none were.
      leave_out_suspects: Whether samples that look mislabelled were left out.
      num_left_out: Samples that were left out so before anything was selected.
      num_short: Samples that are missing to what was asked for, where too few were left.
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
    max_similarity: float | None = None
    leave_out_suspects: bool = False
    num_left_out: int = 0
    num_short: int = 0
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
