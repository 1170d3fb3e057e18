"""Measurements on disk that kinds of data share: reading them, and the table of scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import checks
from dlc_jax.probes import certify
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.selection import INPUTS
from dlc_jax.tasks.task import Samples
from dlc_jax.training.images import read_record
from dlc_jax.training.images.recorder import RECORD
from dlc_jax.types import ProbeLosses
from dlc_jax.workspace import Written, artefacts, records
from dlc_jax.workspace.artefacts import ScoredSamples

# Settings that change speed and memory, but not what comes out.
NOT_IN_LOSSES = ("batch_size", "chunk", "tokens_per_batch")
_FACTS = {
    "dataset?": {"source": str, "fingerprint": str, "skipped?": dict},
    "encoder?": {"name": str, "fingerprint": str},
}


def write_certificate(
    root: Path, probes: ProbeLosses, seed: int, echo: Callable[[str], None]
) -> list[str]:
    """Prints and writes how far the ranking can be trusted; returns the files written."""
    if len(probes.losses) < 2:
        echo("score: note: one probe, whose ranking cannot be compared with that of more")
        return []
    found = certify(probes, seed=seed)
    echo(f"score: {found}")
    artefacts.write_json(root / artefacts.CERTIFICATE, found.to_dict())
    return [artefacts.CERTIFICATE]


def record_with(name: str) -> str:
    """Returns the name of the record that an input is read with."""
    return name if INPUTS[name].of == "encoder" else "training"


def read_input(root: Path, name: str, samples: ScoredSamples) -> np.ndarray:
    """Reads an input of selectors, [n, d].

    Raises:
      ValueError: it was not measured, or is not of these scores.
    """
    check_is_of_these_scores(root, record_with(name))
    if INPUTS[name].of == "encoder":
        return artefacts.read_array(root, input_file(name), name, samples)
    found: np.ndarray = getattr(read_record(root / artefacts.TRAINING, samples.ids), name)
    return found


def input_file(name: str) -> str:
    """Returns the file of a measured input of selectors, below the work directory."""
    return f"scores/{name}.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class TableStep:
    """A row for each sample, a column for each score, `scores/scores.parquet`.

    Attributes:
      root: Work directory that holds losses and, perhaps, a training record.
      class_names: Names of the c classes.
    """

    root: Path
    class_names: tuple[str, ...]

    name = "table"
    kind = "scores"
    stage = "score"
    files = (artefacts.SCORES,)
    obsolete = ()

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        losses = records.read(self.root, "score")
        assert losses is not None  # it has been made
        return {
            "losses": losses.outputs[artefacts.LOSSES],
            "training": self._training(losses),
            "made_of": losses.key["made_of"],
        }

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def _training(self, losses: records.Record) -> str | None:
        """Returns the SHA-256 of the training record of these samples, where there is one."""
        folder, found = _record_of(self.root, "training")
        if found is None or not _have_one_origin(found, losses) or found.damage(folder):
            return None
        return found.outputs.get(RECORD)

    def compute(self, scratch: Path) -> ScoredSamples:
        found = artefacts.read_losses(self.root)
        columns = {"dlc": score(found["losses"])}
        if self.key["training"] is not None:
            record = read_record(self.root / artefacts.TRAINING, found["ids"])
            columns |= {
                column_name(name, variant): score(record, method=name, variant=variant)
                for name, method in SCORES.items()
                if method.of == "training"
                for variant in method.variants
            }
        return ScoredSamples(found["ids"], found["labels"], self.class_names, columns)

    def write(self, root: Path, samples: ScoredSamples) -> Written:
        artefacts.write_scores(root, samples)
        return Written(self.files)


def check_scores_are_whole(root: Path) -> None:
    """Raises ValueError where files of `scores/` are not as the stage `score` left them."""
    losses, table = records.read(root, "score"), records.read(root, "table")
    if losses is None and table is None:
        return  # scores of the user's own
    if losses is None:
        raise checks.InputError(
            f"{root / artefacts.SCORES}: the losses that it was made from are not there any more; "
            "run the stage 'score' again."
        )
    has_table = artefacts.SCORES in losses.outputs  # of instructions
    for record in (losses,) if has_table or table is None else (losses, table):
        if damage := record.damage(root):
            raise checks.InputError(
                f"{root}/scores: not as the stage 'score' left it ({damage}); run that stage again."
            )
    made_from = None if table is None else table.key.get("losses")
    if not has_table and made_from != losses.outputs.get(artefacts.LOSSES):
        raise checks.InputError(
            f"{root / artefacts.SCORES}: not of the losses beside it (a run was stopped while it "
            "wrote); run the stage 'score' again."
        )


def check_is_of_these_scores(root: Path, name: str) -> None:
    """Raises ValueError unless an input, or the training record, is of what was scored."""
    (folder, record), losses = _record_of(root, name), records.read(root, "score")
    if record is None or losses is None or not _have_one_origin(record, losses):
        what = "record of training" if name == "training" else name
        damage: str | None = f"has no {what} of these scores"
    else:
        damage = record.damage(folder)
    if damage is not None:
        raise checks.InputError(
            f"{root}/scores: {damage}; run the stage 'score' with the same settings of selection "
            "and tuning first."
        )


def _record_of(root: Path, name: str) -> tuple[Path, records.Record | None]:
    """Returns the folder of an input, or of the training record, and its record if finished."""
    folder, step = (root, name) if name != "training" else (root / artefacts.TRAINING, records.RUN)
    record = records.read(folder, step)
    return folder, record if record is not None and record.outputs else None


def _have_one_origin(record: records.Record, losses: records.Record) -> bool:
    """Whether both are of the same data and encoder, and images that are seen the same way."""
    return "made_of" in losses.key and record.key.get("made_of") == losses.key["made_of"]


def check_is_what_was_scored(workdir: Path, dataset: Samples) -> None:
    """Raises unless the data set is the one that the scores in the work directory are of."""
    scored = scored_facts(workdir, "dataset")
    fingerprint = scored.get("fingerprint", dataset.fingerprint)
    if fingerprint != dataset.fingerprint:
        raise checks.InputError(
            f"dataset.train: {dataset.name} is not what was scored in {workdir}: its fingerprint "
            f"is {dataset.fingerprint[:12]}, expected {fingerprint[:12]} ({scored.get('source')}). "
            "Run the stages 'score' and 'select' on it, in another work directory."
        )


def scored_facts(workdir: Path, what: str) -> dict[str, Any]:
    """Returns the facts about the data set or encoder that was scored, {} of scores without."""
    found: dict[str, Any] = records.facts_of(workdir, "score", _FACTS).get(what, {})
    return found


def skipped_samples(workdir: Path) -> dict[str, str]:
    """Returns the ids of samples that were left out when the others were scored, and why."""
    skipped: dict[str, str] = scored_facts(workdir, "dataset").get("skipped", {})
    return skipped


def scored_encoder(workdir: Path, fingerprint: str) -> str | None:
    """Returns name and weights of the encoder that was scored; None if it has this fingerprint."""
    scored = scored_facts(workdir, "encoder")
    if scored.get("fingerprint", fingerprint) == fingerprint:
        return None
    return " ".join(str(scored[key]) for key in ("name", "weights") if key in scored)
