"""The stage `report`, and the summary that every run prints of its scores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dlc_jax import expect, reports
from dlc_jax.config import Config
from dlc_jax.reports.results import Row
from dlc_jax.selection import INPUTS, Cell
from dlc_jax.stages.select import Job, pruning_seconds
from dlc_jax.stages.sweep_results import note_on_chance, what_is_finished
from dlc_jax.tasks.measurements import scored_facts
from dlc_jax.workspace import Workspace, Written, artefacts, records


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
    rows = reports.summarise(results)
    table, said = reports.results_table(rows), what_is_finished(config, workdir)
    if note := note_on_chance(workdir):
        said += f"\n\n{note}"
    echo(f"\n{said}\n\n{table}\n")
    shape = {"dataset": {"train": str}, "encoder": {"name": str}}
    trained = records.settings_of(workdir, "finetune", shape) or config.to_dict()
    title = f"{trained['dataset']['train']}, {trained['encoder']['name']}"
    made_of = artefacts.file_hash(workdir / artefacts.RESULTS)
    step = ReportStep(f"{said}\n\n{table}\n", made_of, rows, title)
    workspace.ensure(step)
    if len(step.files) > 1:
        echo(f"files: {workdir}/{artefacts.REPORT}/ (results.md, gap_to_random.png, .svg)")
    else:
        echo("report: no figure: there is no gap to random; add random to selection.methods")


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
