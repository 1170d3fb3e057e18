"""Measurements on disk that kinds of data share: reading them, and the table of scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.distributed import Run
from dlc_jax.probes import certify
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.selection import INPUTS, similarities
from dlc_jax.tasks.task import Samples
from dlc_jax.training.images import read_record
from dlc_jax.training.images.recorder import RECORD
from dlc_jax.types import ProbeLosses
from dlc_jax.workspace import Workspace, Written, artefacts, records
from dlc_jax.workspace.artefacts import ScoredSamples

# Settings that change speed and memory, but not what comes out.
NOT_IN_LOSSES = ("batch_size", "chunk", "tokens_per_batch")
MEASURED_WITH = "measured_with"  # fact of an input: the step whose pass gave it
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


def read_input(root: Path, name: str, samples: ScoredSamples, of: str | None = None) -> np.ndarray:
    """Reads an input of selectors, [n, d].

    Args:
      root: Work directory.
      name: In `INPUTS`.
      samples: Samples that were scored.
      of: What its setting says, where it takes something besides.
    Raises:
      ValueError: it was not measured, or is not of these scores.
    """
    if problem := _problem(root, record_with(name), of):
        raise expect.InputError(
            f"{root}/scores: {problem}; run the stage 'score' with the same settings of selection "
            "and tuning first."
        )
    if INPUTS[name].of == "encoder":
        return artefacts.read_array(root, input_file(name), name, samples)
    return getattr(read_record(root / artefacts.TRAINING, samples.ids), name)


def input_file(name: str) -> str:
    """Returns the file of a measured input of selectors, below the work directory."""
    return f"scores/{name}.npz"


@runtime_checkable
class ScoredData(Protocol):
    """What is scored, and how.

    Attributes:
      config: Configuration with what the encoder or model decides filled in.
      say: Takes each line meant for the user.
      made_of: Data, encoder or model, and how samples are read, which decide every measurement.
      target: What selected samples should be like; None: nothing is asked for. Settings that inputs
        take name attributes such as this one.
      by_the_way: Inputs that another measurement found besides, until their own steps take them.
    """

    @property
    def config(self) -> Config: ...
    @property
    def say(self) -> Callable[[str], None]: ...
    @property
    def made_of(self) -> dict[str, Any]: ...
    @property
    def target(self) -> Samples | None: ...
    @property
    def by_the_way(self) -> dict[str, np.ndarray]: ...
    def run(self, scratch: Path) -> Run:
        """Returns where and on what measurements run."""


class Measurement(NamedTuple):
    """How an input of selectors is measured.

    Attributes:
      measure: Returns the array, [n, d], in the order of the samples that were scored, or what
        `compared` makes it of; in all processes.
      settings: Names of the settings of `probe` that decide it, beside data and encoder.
      compared: Makes the array of the work directory's files and of what was measured, in the first
        process, which alone has those files; None: it is what was measured.
    """

    measure: Callable[[Any, Run], Float32[np.ndarray, "_ d"]]
    settings: tuple[str, ...] = ("dtype",)
    compared: Callable[[Path, np.ndarray], np.ndarray] | None = None


class _Found(NamedTuple):
    """What was measured, and the step in whose pass that was, if not its own."""

    array: np.ndarray
    measured_with: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class InputStep:
    """An input of selectors, an array [n, d], `scores/<name>.npz`.

    Attributes:
      name: One of `INPUTS`.
      how: How it is measured.
    """

    scored: ScoredData
    name: str
    how: Measurement

    stage = "score"
    obsolete = (artefacts.UNFINISHED,)

    @property
    def kind(self) -> str:
        return self.name.replace("_", " ")

    @property
    def files(self) -> tuple[str, ...]:
        return (input_file(self.name),)

    @property
    def key(self) -> dict[str, Any]:
        key = {**self.settings, "made_of": self.scored.made_of}
        setting = INPUTS[self.name].setting
        if setting is None or (taken := getattr(self.scored, setting)) is None:
            return key
        said = getattr(self.scored.config.selection, setting)
        return key | {setting: said, f"{setting}_fingerprint": taken.fingerprint}

    @property
    def settings(self) -> dict[str, Any]:
        probe = self.scored.config.probe
        return {name: getattr(probe, name) for name in self.how.settings}

    def compute(self, scratch: Path) -> _Found:
        if (given := self.scored.by_the_way.pop(self.name, None)) is not None:
            return _Found(given, "score")
        return _Found(self.how.measure(self.scored, self.scored.run(scratch)), None)

    def write(self, root: Path, found: _Found) -> Written:
        array, measured_with = found
        if self.how.compared is not None:
            array = self.how.compared(root, array)
        self.scored.say(f"{self.name}: {array.shape[1]} of each sample")
        ids = artefacts.read_scores(root).ids
        with artefacts.atomic(root / input_file(self.name)) as file:
            np.savez(file, allow_pickle=False, **{self.name: array}, ids=ids)
        return Written(self.files, {MEASURED_WITH: measured_with} if measured_with else {})


def measure_inputs(
    workspace: Workspace, scored: ScoredData, how: Mapping[str, Measurement]
) -> None:
    """Measures the inputs of selectors that are asked for, those first that others are made of."""
    for name in scored.config.need.measured:
        if not workspace.ensure(InputStep(scored, name, how[name])):
            scored.say(f"{name}: unchanged, not measured again")


def similarities_to(root: Path, targets: Float32[np.ndarray, "q d"]) -> Float32[np.ndarray, "n q"]:
    """Returns cosines of the samples, whose features are in the work directory, and of targets."""
    return similarities(read_input(root, "features", artefacts.read_scores(root)), targets)


def note_left_out(scored: ScoredData, num: int) -> None:
    """Notes targets that were left out, where only `num` of them are there."""
    assert scored.target is not None  # checked with the configuration
    if missing := len(scored.target) - num:
        scored.say(
            f"similarities: note: {missing} of the {len(scored.target)} samples of "
            f"{scored.target.name} are left out, since they cannot be read"
        )


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
        training = records.read(self.root / artefacts.TRAINING, records.RUN)
        if _problem(self.root, "training"):
            training = None
        return {
            "losses": losses.outputs[artefacts.LOSSES],
            "training": None if training is None else training.outputs.get(RECORD),
            "made_of": losses.key["made_of"],
        }

    @property
    def settings(self) -> dict[str, Any]:
        return {}

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
        raise expect.InputError(
            f"{root / artefacts.SCORES}: the losses that it was made from are not there any more; "
            "run the stage 'score' again."
        )
    has_table = artefacts.SCORES in losses.outputs  # of instructions
    for record in (losses,) if has_table or table is None else (losses, table):
        if damage := record.damage(root):
            raise expect.InputError(
                f"{root}/scores: not as the stage 'score' left it ({damage}); run that stage again."
            )
    made_from = None if table is None else table.key.get("losses")
    if not has_table and made_from != losses.outputs.get(artefacts.LOSSES):
        raise expect.InputError(
            f"{root / artefacts.SCORES}: not of the losses beside it (a run was stopped while it "
            "wrote); run the stage 'score' again."
        )


def _problem(root: Path, name: str, of: str | None = None) -> str | None:
    """Returns why an input, or the training record, is not of what was scored; None if it is."""
    folder, step = (root, name) if name != "training" else (root / artefacts.TRAINING, records.RUN)
    record, losses = records.read(folder, step), records.read(root, "score")
    # data and encoder, and how images are seen
    made_of = None if losses is None else losses.key.get("made_of")
    if made_of and record is not None and record.outputs and record.key.get("made_of") == made_of:
        setting = INPUTS[name].setting if name in INPUTS else None
        if (found := record.key.get(setting or "")) == of:
            return record.damage(folder)
        return f"{name} are those of {setting} {found}, expected those of {of}"
    return f"has no {'record of training' if name == 'training' else name} of these scores"


def check_is_what_was_scored(workdir: Path, dataset: Samples) -> None:
    """Raises unless the data set is the one that the scores in the work directory are of."""
    scored = scored_facts(workdir, "dataset")
    fingerprint = scored.get("fingerprint", dataset.fingerprint)
    if fingerprint != dataset.fingerprint:
        raise expect.InputError(
            f"dataset.train: {dataset.name} is not what was scored in {workdir}: its fingerprint "
            f"is {dataset.fingerprint[:12]}, expected {fingerprint[:12]} ({scored.get('source')}). "
            "Run the stages 'score' and 'select' on it, in another work directory."
        )


def scored_facts(workdir: Path, what: str) -> dict[str, Any]:
    """Returns the facts about the data set or encoder that was scored, {} of scores without."""
    return (records.settings_of(workdir, "score", _FACTS, "facts") or {}).get(what, {})


def scored_encoder(workdir: Path, fingerprint: str) -> str | None:
    """Returns name and weights of the encoder that was scored; None if it has this fingerprint."""
    scored = scored_facts(workdir, "encoder")
    if scored.get("fingerprint", fingerprint) == fingerprint:
        return None
    return " ".join(str(scored[key]) for key in ("name", "weights") if key in scored)
