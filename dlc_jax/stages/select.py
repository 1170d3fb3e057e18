"""The stage `select`: a kept subset for every cell, from what the methods use; read by others."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.files import array_files
from dlc_jax.files.json_files import check_shape, read_json
from dlc_jax.scores import SCORES
from dlc_jax.selection import AUTO, INPUTS, SELECTORS, Candidates, Cell
from dlc_jax.tasks import Task
from dlc_jax.tasks.doubts import suspects_in
from dlc_jax.tasks.measurements import MEASURED_WITH, read_input, record_with
from dlc_jax.types import Choice, Selection, Tuning, labels_fingerprint
from dlc_jax.workspace import Record, Workspace, Written, artefacts, records


class SelectionInputs:
    """Scores, inputs of selectors and tuning of the samples of a work directory.

    Args:
      config: Says which methods, and how they select.
      workdir: Where `scores/` is.
      samples: Ids, labels and scores.

    Attributes:
      input: Returns one of `INPUTS`, [n, d]; raises ValueError if it was not measured.
      tuning: What `auto` stands for; None until it is known.
    """

    def __init__(self, config: Config, workdir: Path, samples: artefacts.ScoredSamples):
        self.samples, self.mode = samples, config.mode
        self.tuning: Tuning | None = None
        self.input: Callable[[str], np.ndarray] = functools.cache(
            lambda name: read_input(workdir, name, samples, self._is_of(name))
        )
        self._config, self._workdir = config, workdir
        self._fingerprints: dict[str, str] = {}
        self._candidates: dict[tuple[str, ...], Candidates] = {}

    def _is_of(self, name: str) -> str | None:
        """Returns what the setting says that an input takes besides; None: it takes nothing."""
        setting = INPUTS[name].setting
        return None if setting is None else getattr(self._config.selection, setting)

    def _inputs_of(self, method: str) -> list[str]:
        """Returns the names of the inputs that a method, or `auto`, uses."""
        if method == AUTO:
            return ["features"] if self._config.tuning.needs_features else []
        needed = {*self._config.selection.inputs_of(SELECTORS[method])}
        if self._config.selection.max_similarity is not None:
            needed.add("features")
        return [name for name in INPUTS if name in needed]

    def how(self, cell: Cell) -> dict[str, Any]:
        """Returns what decides the selection of a cell besides the scores that it uses."""
        how = self._config.selection.how(cell.method)
        if AUTO in (cell.method, cell.split):
            how["tuning"] = self._tuned_from
        return how

    @functools.cached_property
    def _tuned_from(self) -> str:
        """Hash of what decides what `auto` stands for, but for keep fractions tuned too."""
        tuning = records.read(self._workdir, "tune")
        key = {} if tuning is None else tuning.key
        found = {name: value for name, value in key.items() if name != "keep_fractions"}
        number = None if tuning is None else tuning.number
        return artefacts.json_hash([self._config.decides_auto, found, number])

    def earlier_seconds(self, cell: Cell) -> float:
        """Returns the time that the selection of a cell waits for: of measuring and tuning."""
        method, _, split, _ = cell
        if AUTO in (method, split):
            names = {"tune", *self._inputs_of(AUTO)}
        else:
            names = set().union(*map(self._measured_in, self._inputs_of(method)))
        if self._by_scores(method):
            of = SCORES[self._config.selection.score_name(method)].of
            names.add("training" if of == "training" else "score")
        if self._config.selection.leave_out_suspects:
            names.add("score")
        return sum(self._records[name].seconds for name in names & self._records.keys())

    def _measured_in(self, name: str) -> set[str]:
        """Returns the steps that gave an input, and what it is made of."""
        step, made_of = record_with(name), INPUTS[name].made_of
        found = {step} if made_of is None else {step} | self._measured_in(made_of)
        facts = self._records[step].facts if step in self._records else {}
        return found | {str(facts.get(MEASURED_WITH, step))}

    @functools.cached_property
    def _records(self) -> dict[str, Record]:
        return {record.step: record for record in records.matching(self._workdir, "*")}

    @functools.cached_property
    def _suspects(self) -> np.ndarray | None:
        """[n] samples that look mislabelled; None: they are not left out."""
        if not self._config.selection.leave_out_suspects:
            return None
        return suspects_in(self._workdir, self.samples.class_names).is_suspect

    def _by_scores(self, method: str) -> bool:
        """Whether scores decide what a method selects, or how much of each class."""
        by_difficulty = self._config.selection.allocation != "proportional"
        return method == AUTO or "scores" in SELECTORS[method].needs or by_difficulty

    def fingerprint(self, method: str) -> str:
        """SHA-256 over the samples and what a selection of this method uses."""
        if method not in self._fingerprints:
            name = self._config.selection.score_of(method) if self._by_scores(method) else "dlc"
            arrays = {name: self.samples.score(name)}
            arrays |= {name: self.input(name) for name in self._inputs_of(method)}
            if self._suspects is not None:
                arrays["suspects"] = self._suspects
            self._fingerprints[method] = self.samples.fingerprint_of(arrays)
        return self._fingerprints[method]

    def select(self, cell: Cell) -> Selection:
        """Selects a cell."""
        selection, samples = self._config.selection, self.samples
        score, *names = by = (selection.score_of(cell.method), *self._inputs_of(cell.method))
        if by not in self._candidates:
            inputs = {name: self.input(name) for name in names}
            self._candidates[by] = Candidates(
                samples.score(score),
                samples.labels,
                ids=samples.ids,
                inputs=inputs,
                suspects=self._suspects,
            )
        return self._candidates[by].select(
            **cell._asdict(),
            tuning=self.tuning if AUTO in (cell.method, cell.split) else None,
            mode=self.mode,
            kind=self._config.conventions.released,
            rules=selection.rules_of(cell.method),
        )


EARLIER = "earlier_seconds"  # of measuring and tuning, which a selection waits for
CELL = {"method": str, "keep_fraction": float, "split": (float, str, None), "seed": int}
CHOICE = {"keep_fraction": float, "method": str, "split": (float, None), "why": str}
_MANIFEST = CELL | {"chosen": (CHOICE, None), "num_left_out?": int, "num_short?": int}


@dataclasses.dataclass(frozen=True, eq=False)
class SelectionStep:
    """Kept positions of a cell, and their manifest, `selections/<method>/<cell>`."""

    inputs: SelectionInputs
    cell: Cell

    kind = "selection"
    stage = "select"
    obsolete = ()

    @property
    def name(self) -> str:
        return f"{artefacts.SELECTIONS}/{self.cell.name}"

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.name}.npy", f"{self.name}.json"

    @property
    def key(self) -> dict[str, Any]:
        return {
            "cell": self.cell._asdict(),
            "mode": self.inputs.mode,
            "how": self.inputs.how(self.cell),
            "scores_fingerprint": self.inputs.fingerprint(self.cell.method),
            "num_samples": len(self.inputs.samples.ids),
        }

    @property
    def settings(self) -> dict[str, Any]:
        return {"mode": self.inputs.mode, **self.inputs.how(self.cell)}

    def compute(self, scratch: Path) -> Selection:
        return self.inputs.select(self.cell)

    def write(self, root: Path, selection: Selection) -> Written:
        samples = self.inputs.samples
        kept = np.zeros(len(samples.ids), bool)
        kept[selection.indices] = True
        sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
        singles = [samples.class_names[j] for j in selection.single_sample_classes]
        per_class = zip(samples.class_names, sizes, selection.num_kept_per_class, strict=True)
        manifest = {
            **self.cell._asdict(),
            "version": artefacts.versions()["dlc_jax"],
            "mode": selection.mode,
            "chosen": None if selection.chosen is None else selection.chosen._asdict(),
            "num_samples": len(kept),
            "kept": _ids_summary(samples, kept),
            "dropped": _ids_summary(samples, ~kept),
            "per_class": {
                name: {"samples": int(size), "kept": int(num)} for name, size, num in per_class
            },
            "single_sample_classes": singles,
            "how": self.inputs.how(self.cell),
            "scores_fingerprint": self.inputs.fingerprint(self.cell.method),
        }
        if selection.max_similarity is not None or selection.leave_out_suspects:
            manifest |= {name: getattr(selection, name) for name in ("num_left_out", "num_short")}
        positions, described = (root / name for name in self.files)
        with artefacts.atomic(positions) as file:
            np.save(file, selection.indices)
        artefacts.write_json(described, manifest)
        return Written(self.files, {EARLIER: round(self.inputs.earlier_seconds(self.cell), 3)})

    def read(self, root: Path) -> Selection:
        """Reads the selection, with the ids of the kept samples and of all."""
        path, described = (root / name for name in self.files)
        samples, how = self.inputs.samples, self.inputs.how(self.cell)
        manifest = read_json(described, _MANIFEST)
        chosen = manifest["chosen"]
        indices = array_files.read_npy(path)
        expect.positions(str(path), indices, len(samples.ids))
        sizes = np.bincount(samples.labels[indices], minlength=len(samples.class_names))
        return Selection(
            indices=indices,
            num_left_out=manifest.get("num_left_out", 0),
            num_short=manifest.get("num_short", 0),
            **self.cell._asdict(),
            mode=self.inputs.mode,
            **{
                name: value
                for name, value in how.items()
                if name not in ("score", "tuning", "target", "second_encoder")
            },
            chosen=None if chosen is None else choice_of(chosen),
            num_kept_per_class=sizes,
            labels_fingerprint=labels_fingerprint(samples.labels),
            ids=samples.ids[indices],
            scored_ids=samples.ids,
        )


def read_selection(workspace: Workspace, inputs: SelectionInputs, cell: Cell) -> Selection:
    """Returns the selection of a cell, which the stage `select` has made.

    Raises:
      ValueError: it is not there, is of another cell, was made from other scores, in another mode
        or another way, or its files have changed since.
    """
    step = SelectionStep(inputs, cell)
    path, described = (workspace.root / name for name in step.files)
    manifest = read_json(described, _MANIFEST)
    if not path.exists() or not manifest:
        raise expect.InputError(f"{path}: not there; run the stage 'select' for it first.")
    if cell_of(manifest) != cell:
        raise expect.InputError(
            f"{described}: is of {cell_of(manifest).name}, expected {cell.name}. "
            "Run the stage 'select' again."
        )
    workspace.check(step)
    return step.read(workspace.root)


def pruning_seconds(root: Path) -> dict[str, float]:
    """Returns the time that it took to know what to keep, in seconds, by the name of the cell."""
    found = {}
    for record in records.matching(root, f"{artefacts.SELECTIONS}/*/*"):
        check_shape(record.facts, {EARLIER: float}, root / records.file_of(record.step), "facts")
        name = record.step.removeprefix(f"{artefacts.SELECTIONS}/")
        found[name] = record.seconds + record.facts[EARLIER]
    return found


def cell_of(facts: Mapping[str, Any]) -> Cell:
    """Returns the cell that a manifest, or the start of a run, is of."""
    return Cell(*(facts[name] for name in Cell._fields))


def choice_of(facts: Mapping[str, Any]) -> Choice:
    """Returns what `auto` stood for, as a manifest or a tuning has it."""
    return Choice(*(facts[name] for name in Choice._fields))


def _ids_summary(samples: artefacts.ScoredSamples, some: np.ndarray) -> dict[str, Any]:
    """Count, and SHA-256 of the sorted ids joined by newlines, of the samples that [n] marks."""
    ids = samples.ids[samples.by_id[some[samples.by_id]]].tolist()
    return {"count": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}


@dataclasses.dataclass
class Job:
    """State shared by the stages that use scores.

    Attributes:
      config: Checked configuration.
      workspace: Work directory, held by this run.
      task: The kind of data, with these settings.
      inputs: Scores and other inputs of selections; None in processes other than the first.
      shown: Selection that the summary shows; None before one is made.
      failures: A line for each run that failed; the others go on.
    """

    config: Config
    workspace: Workspace
    task: Task
    inputs: SelectionInputs | None = None
    shown: Selection | None = None
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> SelectionInputs:
        """The inputs, in the first process, the only one that holds them."""
        assert self.inputs is not None
        return self.inputs


def run(job: Job) -> None:
    """Writes every cell; shown is then the middle one of the first method.

    Raises:
      ValueError: something that a method needs is missing.
    """
    config, workspace, inputs = job.config, job.workspace, job.scored
    start, say = time.perf_counter(), workspace.say
    for method in config.selection.methods:  # what is missing is said before anything is moved
        inputs.fingerprint(method)
    settings = records.settings_of(workspace.root, "score", {}) or {}
    if (scored := settings.get("mode", config.mode)) != config.mode:
        say(f"select: note: in mode {config.mode!r}, from scores of mode {scored!r}")
    found = records.matching(workspace.root, f"{artefacts.SELECTIONS}/*/*")
    superseded = [record for record in found if not _is_current(record, inputs)]
    for record in superseded:
        workspace.set_aside(record)
    if superseded:
        others = "of other scores or mode moved to superseded/, or made with other settings"
        say(f"select: {len(superseded)} selections {others}")
    cells, num_made = config.selection.cells(), 0
    bare: set[float] = set()  # keep fractions already noted
    short: set[float] = set()
    for cell in cells:
        made = workspace.ensure(SelectionStep(inputs, cell))
        if made is None:
            continue
        num_made += 1
        limit, num_left_out = made.value.max_similarity, made.value.num_left_out
        why = ["suspect labels"] if made.value.leave_out_suspects else []
        why += [f"near-duplicates of others (a cosine above {limit:g})"] if limit else []
        if num_made == 1 and why:  # of every method the same
            left_out = f"{num_left_out} of {len(inputs.samples.ids)} samples left out"
            say(f"select: {left_out} as {' and '.join(why)}")
        if made.value.num_short and cell.keep_fraction not in short:
            short.add(cell.keep_fraction)
            say(
                f"select: note: {cell.name} keeps {len(made.value)}, {made.value.num_short} fewer "
                "than asked for: after what is left out there are no more"
            )
        num_lost = int((made.value.num_kept_per_class == 0).sum())
        if num_lost and cell.keep_fraction not in bare:
            bare.add(cell.keep_fraction)
            say(
                f"select: note: keep fraction {cell.keep_fraction:g} keeps nothing of {num_lost} "
                f"of {len(inputs.samples.class_names)} classes (budgets are rounded in every "
                "class; selection.min_per_class=1 keeps one)"
            )
    if num_made or superseded:
        made_with = {"mode": config.mode, "selection": config.to_dict()["selection"]}
        facts = {"pruning_seconds": pruning_seconds(workspace.root)}
        workspace.note("select", made_with, time.perf_counter() - start, facts)
    if num_made:
        say(f"select: {num_made} selections written")
    elif superseded:
        say(f"select: {len(cells)} selections taken back from superseded/")
    else:
        say("select: unchanged, not run again")
    of_first = [cell for cell in cells if cell.method == config.selection.methods[0]]
    job.shown = SelectionStep(inputs, of_first[len(of_first) // 2]).read(workspace.root)


def _is_current(record: Record, inputs: SelectionInputs) -> bool:
    """Whether a selection is of these scores, of this mode and made this way."""
    try:
        cell = Cell(**record.key[records.CELL])
        return record.difference(SelectionStep(inputs, cell)) is None
    except (LookupError, TypeError, ValueError):
        return False  # what the method needs is not there any more, or the record was changed
