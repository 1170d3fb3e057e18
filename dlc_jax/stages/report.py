"""The stage `report`, and the summary that every run prints of its scores."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dlc_jax import expect, reports
from dlc_jax.config import Config
from dlc_jax.reports.results import Result, Row
from dlc_jax.selection import FULL, INPUTS, Cell
from dlc_jax.stages.beside_paper import beside_paper
from dlc_jax.stages.select import Job, pruning_seconds
from dlc_jax.stages.sweep_results import read_runs, run_folder
from dlc_jax.tasks.measurements import scored_facts
from dlc_jax.training.loop import PER_CLASS, PREDICTIONS, read_metrics, read_predictions
from dlc_jax.workspace import Workspace, Written, artefacts, records

_SHOWN = ("epochs", "batch_size", "optimiser", "rank", "learning_rate", "linear_probe", "dtype")


def report_if_it_can(job: Job) -> None:
    """Prints and saves the report; where runs failed, what it lacks is only printed."""
    try:
        _report(job.config, job.workspace)
    except expect.InputError as error:
        if not job.failures:
            raise
        job.workspace.say(f"report: {error}")


@contextlib.contextmanager
def report_of_these_results(workspace: Workspace) -> Iterator[None]:
    """Deletes the report if the results change meanwhile: it would be of other runs."""
    results = workspace.root / artefacts.RESULTS
    before = artefacts.read_bytes(results)
    try:
        yield
    finally:
        if artefacts.read_bytes(results) != before:
            workspace.remove(records.file_of(ReportStep.name))
            workspace.remove(artefacts.REPORT)


@dataclasses.dataclass(frozen=True, eq=False)
class ReportStep:
    """Table and figure of `results.csv`, `report/`.

    Attributes:
      text: What is written, Markdown.
      results: SHA-256 of `results.csv`.
      rows: What is drawn; without a gap to random there is no figure.
      title: Title of the figure.
    """

    text: str
    results: str
    rows: list[Row]
    title: str

    name = kind = stage = "report"
    obsolete = ()
    settings: ClassVar[Mapping[str, Any]] = {}

    @property
    def key(self) -> dict[str, Any]:
        return {"text": self.text, "results": self.results, "title": self.title}

    @property
    def files(self) -> tuple[str, ...]:
        has_figure = any(row.gap is not None for row in self.rows)
        figures = ("gap_to_random.png", "gap_to_random.svg") if has_figure else ()
        return tuple(f"{artefacts.REPORT}/{name}" for name in ("results.md", *figures))

    def compute(self, scratch: Path) -> None:
        """Nothing: it is cheap to write."""

    def write(self, root: Path, _: None) -> Written:
        table, *figures = self.files
        with artefacts.atomic(root / table, "w") as file:
            file.write(self.text)
        if figures:
            figure = reports.gap_to_random(self.rows, self.title)
        for name in figures:
            with artefacts.atomic(root / name) as file:
                figure.savefig(file, format=Path(name).suffix[1:], dpi=150)
        return Written(self.files)


def _report(config: Config, workspace: Workspace) -> None:
    """Prints and saves what `results.csv` says."""
    workdir, echo = workspace
    seconds = pruning_seconds(workdir)
    results = [
        result._replace(pruning_seconds=seconds.get(Cell(*result[:4]).name, math.nan))
        for result in reports.read_results(workdir / artefacts.RESULTS)
    ]
    results, left_out = _with_predictions(workdir, results)
    rows = reports.summarise(results)
    table, said = reports.results_table(rows), what_is_finished(config, workdir)
    if note := note_on_chance(workdir):
        said += f"\n\n{note}"
    if left_out:
        said += f"\n\nNote: predictions that are left out: {'; '.join(left_out)}."
    # images have no perplexity to compare with
    is_compared = "responses" in config.data_kind.measures and (workdir / artefacts.SCORES).exists()
    scores = artefacts.read_scores(workdir).scores if is_compared else {}
    if added := reports.what_dlc_adds(scores):
        said += f"\n\n{added}."
    text = "\n\n".join(filter(None, [said, table, beside_paper(workdir, results)]))
    echo(f"\n{text}\n")
    shape = {"dataset": {"train": str}, "encoder": {"name": str}}
    trained = records.settings_of(workdir, "finetune", shape) or config.to_dict()
    title = f"{trained['dataset']['train']}, {trained['encoder']['name']}"
    made_of = artefacts.file_hash(workdir / artefacts.RESULTS)
    step = ReportStep(f"{text}\n", made_of, rows, title)
    workspace.ensure(step)
    if len(step.files) > 1:
        echo(f"files: {workdir}/{artefacts.REPORT}/ (results.md, gap_to_random.png, .svg)")
    else:
        echo("report: no figure: there is no gap to random; add random to selection.methods")


def _with_predictions(workdir: Path, results: list[Result]) -> tuple[list[Result], list[str]]:
    """Returns results with whether each test sample was right, and why some are without.

    Runs that were tested on the same samples have the same labels; those of most runs count.
    """
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    left_out = []
    for place, result in enumerate(results):
        folder = run_folder(workdir, Cell(*result[:4]))
        if (folder / PREDICTIONS).exists():
            try:
                found[place] = read_predictions(folder)
            except expect.InputError as error:
                left_out.append(str(error).removesuffix("."))
    counts = collections.Counter(labels.tobytes() for _, labels in found.values())
    usual = max(counts, key=counts.__getitem__, default=b"")
    results = results.copy()
    for place, (predicted, labels) in found.items():
        if labels.tobytes() != usual or len(predicted) != len(labels):
            name = Cell(*results[place][:4]).name
            left_out.append(f"{name} was tested on other samples than most")
        else:
            results[place] = results[place]._replace(right=predicted == labels)
    return results, left_out


def what_is_finished(config: Config, workdir: Path) -> str:
    """Returns how much of a sweep `results.csv` holds, and how its runs were trained."""
    known, unreadable = read_runs(workdir)
    finished = {name for name, run in known.items() if records.RESULT in run.facts}
    asked = {cell.name for cell in config.runs()}
    said = f"{len(asked & finished)} of the {len(asked)} runs asked for are finished"
    if others := len(finished - asked):
        said += f"; {others} others are in the table as well"
    if unreadable:
        said += f"; left out: {'; '.join(unreadable.values()).removesuffix('.')}"
    settings = next((known[name].settings for name in sorted(finished)), None)
    if settings is None:
        return f"{said}."
    mine = dataclasses.asdict(config.training)
    shown = [key for key in _SHOWN if key in mine and key in settings]
    said += ". Trained with " + ", ".join(f"{key} {settings[key]}" for key in shown)
    if differ := [key for key in shown if settings[key] != mine[key]]:
        said += f" (the configuration says {', '.join(f'{key} {mine[key]}' for key in differ)})"
    return f"{said}."


def note_on_chance(workdir: Path) -> str:
    """Returns a line on runs that learned nothing, the full set's first; "" if there are none."""
    paths = (workdir / artefacts.FINETUNE).glob("*/*")
    full_first = sorted(paths, key=lambda path: path.parent.name != FULL)
    ends = [end for end in map(_end_of, full_first) if end is not None]
    at_chance = [end for end in ends if end]
    if not at_chance:
        return ""
    return (
        f"Note: {len(at_chance)} of {len(ends)} runs learned nothing, such as {at_chance[0]}. "
        "Raise finetune.learning_rate or finetune.epochs, or lower finetune.batch_size."
    )


def _end_of(path: Path) -> str | None:
    """Returns how a run on images ended at chance; "" if it did better.

    Chance: accuracies in the last epoch and in the test are at most three standard deviations above
    guessing. None if the run has not ended, was not trained or is unreadable, and for one class,
    which is always guessed right.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, csv.Error):
        run = records.read(path, records.RUN)
        with open(path / PER_CLASS, newline="") as file:
            tested = [int(row["num_test"]) for row in csv.DictReader(file)]
        if run is None or len(tested) < 2:
            return None
        result, share = run.facts[records.RESULT], 1 / len(tested)
        trained = float(read_metrics(path)[-1]["train_accuracy"])
        right, num_kept = float(result["test_accuracy"]), int(result["num_kept"])
        in_training, in_test = (
            100 * (share + 3 * math.sqrt(share * (1 - share) / max(number, 1)))
            for number in (num_kept, sum(tested))
        )
        if not (trained <= in_training and right <= in_test):
            return ""
        return (
            f"{path.parent.name}: {trained:.1f} % right in training and {right:.1f} % in the test, "
            f"where guessing among {len(tested)} classes gives {100 / len(tested):.1f} %"
        )
    return None


def print_summary(job: Job) -> None:
    """Prints a table of classes, what was left out, and how long each stage took."""
    (workdir, echo), samples, shown = job.workspace, job.scored.samples, job.shown
    echo("")
    if shown is not None:
        cell = Cell(shown.method, shown.keep_fraction, shown.split, shown.seed)
        chosen = "" if shown.chosen is None else f" ({shown.chosen.label})"
        echo(f"kept as in selections/{cell.name}{chosen}:")
    names, labels = samples.class_names, samples.labels
    indices = None if shown is None else shown.indices
    echo(reports.class_table(names, labels, samples.scores["dlc"], samples.ids, indices))
    echo("")
    if added := reports.what_dlc_adds(samples.scores):
        echo(added)
    sizes = np.bincount(labels, minlength=len(names))
    if singles := [names[j] for j in np.flatnonzero(sizes == 1)]:
        listed = expect.listed(map(expect.visible, singles))
        echo(f"classes of one sample (in mode 'default' always kept): {listed}")
    if skipped := scored_facts(workdir, "dataset").get("skipped"):
        echo(f"{job.task.left_out}: {len(skipped)}, listed in {artefacts.PROVENANCE}")
    seconds = {record.step: record.seconds for record in records.matching(workdir, "*")}
    parts = [n for n in ("score", *INPUTS, "training", "tune", "select") if n in seconds]
    echo(f"seconds, when last run: {', '.join(f'{name} {seconds[name]:.1f}' for name in parts)}")
    echo(f"files: {workdir}/ ({artefacts.SCORES}, {job.task.easiest_hardest}, selections/)")
