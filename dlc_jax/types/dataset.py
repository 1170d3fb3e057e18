"""Labelled images behind random access, and SHA-256 of what is handed on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from dlc_jax import expect
from dlc_jax.files.image_files import depth


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
