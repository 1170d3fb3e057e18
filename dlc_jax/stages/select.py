"""The stage `select`: a kept subset for every cell, below `selections/`."""

from __future__ import annotations

import time

from dlc_jax.config import Config
from dlc_jax.selection import Cell
from dlc_jax.stages.selections import Job, SelectionInputs, SelectionStep, pruning_seconds
from dlc_jax.stages.tune import run_tune
from dlc_jax.types import Selection
from dlc_jax.workspace import Record, Workspace, artefacts, records


def run(job: Job) -> None:
    """Selects, in the first process."""

    def select() -> None:
        if job.config.need.tuning and job.scored.tuning is None:
            run_tune(job)
        job.shown = run_select(job.config, job.workspace, job.scored)

    job.workspace.alone(select)


def run_select(config: Config, workspace: Workspace, inputs: SelectionInputs) -> Selection:
    """Writes every cell; returns the one the summary shows, the middle one of the first method.

    Args:
      config: Checked configuration.
      workspace: Where `selections/` goes.
      inputs: What the methods use.
    Raises:
      ValueError: something that a method needs is missing.
    """
    start, say = time.perf_counter(), workspace.say
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
    for cell in cells:
        made = workspace.ensure(SelectionStep(inputs, cell))
        if made is None:
            continue
        num_made += 1
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
    return SelectionStep(inputs, of_first[len(of_first) // 2]).read(workspace.root)


def _is_current(record: Record, inputs: SelectionInputs) -> bool:
    """Whether a selection is of these scores, of this mode and made this way."""
    try:
        cell = Cell(**record.key[records.CELL])
        return record.difference(SelectionStep(inputs, cell)) is None
    except (LookupError, TypeError, ValueError):
        return False  # what the method needs is not there any more, or the record was changed
