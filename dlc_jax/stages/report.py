"""The stage `report`, and the summary that every run prints of its scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dlc_jax import checks, reports
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.distributed import processes
from dlc_jax.selection import Cell
from dlc_jax.stages.score_instructions import READABLE
from dlc_jax.stages.sweep_results import (
    note_on_chance,
    what_is_finished,
)
from dlc_jax.types import Selection
from dlc_jax.workspace import artefacts, provenance
from dlc_jax.workspace.artefacts import ScoredSamples


def report_if_it_can(
    config: Config, workdir: Path, failed: bool, echo: Callable[[str], None]
) -> None:
    """Prints and saves the report; where runs failed, what it lacks is only printed."""
    try:
        _report(config, workdir, echo)
    except checks.InputError as error:
        if not failed:
            raise
        echo(f"report: {error}")


@contextlib.contextmanager
def report_of_these_results(workdir: Path) -> Iterator[None]:
    """Deletes the report if the results change meanwhile: it would be of other runs."""
    before = artefacts.read_bytes(workdir / artefacts.RESULTS)
    try:
        yield
    finally:
        changed = artefacts.read_bytes(workdir / artefacts.RESULTS) != before
        if changed and processes.is_first():
            artefacts.remove(workdir / artefacts.REPORT)


def _report(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Prints and saves what `results.csv` says."""
    seconds = provenance.pruning_seconds(workdir)
    results = [
        result._replace(pruning_seconds=seconds.get(Cell(*result[:4]).name, math.nan))
        for result in reports.read_results(workdir / artefacts.RESULTS)
    ]
    rows = reports.summarise(results)
    table, said = reports.results_table(rows), what_is_finished(config, workdir)
    if note := note_on_chance(workdir):
        said += f"\n\n{note}"
    echo(f"\n{said}\n\n{table}\n")
    with artefacts.atomic(workdir / artefacts.REPORT / "results.md", "w") as file:
        file.write(f"{said}\n\n{table}\n")
    if all(row.gap is None for row in rows):
        echo("report: no figure: there is no gap to random; add random to selection.methods")
        return
    shape = {"dataset": {"train": str}, "encoder": {"name": str}}
    trained = provenance.settings_of(workdir, "finetune", shape) or config.to_dict()
    title = f"{trained['dataset']['train']}, {trained['encoder']['name']}"
    figure = reports.gap_to_random(rows, title)
    for kind in ("png", "svg"):
        with artefacts.atomic(workdir / artefacts.REPORT / f"gap_to_random.{kind}") as file:
            figure.savefig(file, format=kind, dpi=150)
    echo(f"files: {workdir}/{artefacts.REPORT}/ (results.md, gap_to_random.png, .svg)")


def print_summary(
    workdir: Path,
    samples: ScoredSamples,
    shown: Selection | None,
    is_of_instructions: bool,
    echo: Callable[[str], None],
) -> None:
    """Prints a table of classes, what was left out, and how long each stage took."""
    indices = None
    echo("")
    if shown is not None:
        indices = shown.indices
        cell = Cell(shown.method, shown.keep_fraction, shown.split, shown.seed)
        chosen = "" if shown.chosen is None else f" ({shown.chosen.label})"
        echo(f"kept as in selections/{cell.name}{chosen}:")
    echo(
        reports.class_table(
            samples.class_names, samples.labels, samples.scores["dlc"], samples.ids, indices
        )
    )
    echo("")
    sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
    singles = [samples.class_names[j] for j in np.flatnonzero(sizes == 1)]
    if singles:
        names = checks.listed(map(visible, singles))
        echo(f"classes of one sample (in mode 'default' always kept): {names}")
    known = provenance.read(workdir)
    skipped = known.get("dataset", {}).get("skipped", {})
    if skipped:
        kind = "" if is_of_instructions else "unreadable "
        echo(f"{kind}samples left out: {len(skipped)}, listed in {artefacts.PROVENANCE}")
    stages = known.get("stages", {})
    parts = ("score", "features", "training", "tune", "select")
    seconds = {name: stages[name]["seconds"] for name in parts if name in stages}
    echo(
        "seconds, when last run: "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    )
    picture = READABLE if is_of_instructions else artefacts.PICTURE
    echo(f"files: {workdir}/ ({artefacts.SCORES}, {picture}, selections/)")
