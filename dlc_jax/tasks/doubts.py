"""Tables of images to look at: labels that are suspect, and near-duplicates."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import expect, reports
from dlc_jax.expect import csv_cell, visible
from dlc_jax.files.array_files import load_npz
from dlc_jax.selection import SuspectLabels, most_similar, suspect_labels
from dlc_jax.tasks.measurements import input_file, read_input
from dlc_jax.types import Dataset, ProbeLosses
from dlc_jax.workspace import Workspace, Written, artefacts, records

SHARE = "share_of_informative_probes"  # fact of the losses, which earlier versions lack
SIMILAR = 0.95  # cosine above which images are listed where no limit is asked for
_MOST = 50_000  # samples of which all pairs are compared unasked


def suspects_in(root: Path, class_names: tuple[str, ...]) -> SuspectLabels:
    """Returns which of the samples that were scored in a work directory look mislabelled.

    Raises:
      ValueError: the losses are of an earlier version, which kept no nearest classes.
    """
    found = artefacts.read_losses(root)
    if "nearest" not in found:
        raise expect.InputError(
            f"{root / artefacts.LOSSES}: has no array 'nearest', the class whose prototype is "
            "nearest, which earlier versions did not keep; run the stage 'score' in another work "
            "directory."
        )
    of_probes: dict[str, Any] = dict(found)
    not_kept = np.zeros((len(class_names), 0), np.float32)
    return suspect_labels(ProbeLosses(**of_probes, prototypes=not_kept, class_names=class_names))


@dataclasses.dataclass(frozen=True, eq=False)
class SuspectsStep:
    """Samples that look mislabelled, `scores/suspect_labels.csv`, and a picture of the worst.

    Attributes:
      root: Work directory that holds the losses.
      dataset: What was scored.
      say: Takes each line meant for the user.
    """

    root: Path
    dataset: Dataset
    say: Callable[[str], None]

    name = "suspect_labels"
    kind = "suspect labels"
    stage = "score"
    files = (artefacts.SUSPECTS, artefacts.SUSPECTS_PICTURE)
    obsolete = ()

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        return _made_of(self.root, "score", artefacts.LOSSES)

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def compute(self, scratch: Path) -> SuspectLabels:
        return suspects_in(self.root, self.dataset.class_names)

    def write(self, root: Path, found: SuspectLabels) -> Written:
        data, ids = self.dataset, load_npz(root / artefacts.LOSSES, ["ids"])["ids"]
        # others could not be read
        places = np.flatnonzero(np.isin(data.ids, ids))[found.ranked]
        names, suggested = [*map(visible, data.class_names)], found.suggested[found.ranked]
        columns = ("id", "class", "suggested_class", "probes_right", "score")
        rows = zip(
            data.ids[places].tolist(),
            (names[label] for label in data.labels[places]),
            (names[label] for label in suggested),
            found.num_right[found.ranked].tolist(),
            (f"{score:.6g}" for score in found.scores[found.ranked]),
            strict=True,
        )
        _write_table(root / artefacts.SUSPECTS, columns, rows)
        picture = reports.mislabelled(data, places, suggested)
        with artefacts.atomic(root / artefacts.SUSPECTS_PICTURE) as file:
            picture.save(file, "PNG", optimize=True)
        self.say(
            f"suspect labels: {len(places)} of {len(ids)} samples look mislabelled, to an encoder "
            f"that is right about {found.share_right.max():.0%} at best, see {artefacts.SUSPECTS}"
        )
        return Written(self.files)


def list_suspects(workspace: Workspace, dataset: Dataset) -> None:
    """Writes the table of suspect labels, if the losses have what it is made of."""
    losses = records.read(workspace.root, "score")
    if losses is None or SHARE not in losses.facts:
        workspace.say(
            "suspect labels: note: no table, since an earlier version measured these losses, which "
            "kept no nearest classes"
        )
        for name in (*SuspectsStep.files, records.file_of(SuspectsStep.name)):
            workspace.remove(name)  # of other losses
        return
    workspace.ensure(SuspectsStep(workspace.root, dataset, workspace.say))


@dataclasses.dataclass(frozen=True, eq=False)
class NearDuplicatesStep:
    """Each sample whose most similar one is like it, `scores/near_duplicates.csv`.

    Attributes:
      root: Work directory that holds the features.
      class_names: Names of the c classes.
      limit: Cosine that is exceeded.
      say: Takes each line meant for the user.
    """

    root: Path
    class_names: tuple[str, ...]
    limit: float
    say: Callable[[str], None]

    name = "near_duplicates"
    kind = "near duplicates"
    stage = "score"
    files = (artefacts.NEAR_DUPLICATES,)
    obsolete = ()

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        return _made_of(self.root, "features", input_file("features")) | {"limit": self.limit}

    @property
    def settings(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def compute(self, scratch: Path) -> list[tuple[int, int, float]] | None:
        """Returns pairs of positions, each once, and their cosines, the most similar first.

        None where there are too many images to compare.
        """
        features = read_input(self.root, "features", artefacts.read_scores(self.root))
        some = np.flatnonzero(features.any(axis=1))  # others have no direction
        if len(some) > _MOST:
            self.say(
                f"near-duplicates: note: not looked for: all pairs of up to {_MOST:,} images are "
                f"compared, and there are {len(some):,}"
            )
            return None
        if len(some) < 2:
            return []
        others, cosines = most_similar(features[some])
        pairs = {
            (min(a, b), max(a, b)): cosine
            for a, b, cosine in zip(
                some.tolist(), some[others].tolist(), cosines.tolist(), strict=True
            )
            if cosine > self.limit
        }
        return sorted(((*pair, cosine) for pair, cosine in pairs.items()), key=lambda row: -row[2])

    def write(self, root: Path, pairs: list[tuple[int, int, float]] | None) -> Written:
        samples, names = artefacts.read_scores(root), [*map(visible, self.class_names)]
        ids, labels = samples.ids.tolist(), samples.labels.tolist()
        columns = ("id", "class", "other_id", "other_class", "cosine")
        rows = (
            (ids[a], names[labels[a]], ids[b], names[labels[b]], f"{cosine:.6f}")
            for a, b, cosine in pairs or ()
        )
        _write_table(root / artefacts.NEAR_DUPLICATES, columns, rows)
        if pairs is None:
            return Written(self.files)
        num_mixed = sum(labels[a] != labels[b] for a, b, _ in pairs)
        self.say(
            f"near-duplicates: {len(pairs)} pairs with a cosine above {self.limit:g}, {num_mixed} "
            f"of two classes, see {artefacts.NEAR_DUPLICATES}"
        )
        return Written(self.files)


def _made_of(root: Path, step: str, file: str) -> dict[str, Any]:
    record = records.read(root, step)
    assert record is not None  # it has been made
    return {"made_of": record.key["made_of"], "file": record.outputs[file]}


def _write_table(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with artefacts.atomic(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(map(csv_cell, row) for row in rows)
