"""The stage `export`: every selected cell in the forms asked for, below `exports/`."""

from __future__ import annotations

from dlc_jax.stages.select import Job, read_selection
from dlc_jax.tasks.measurements import check_is_what_was_scored
from dlc_jax.workspace import artefacts


def run(job: Job) -> None:
    """Writes the exports, each whole or not there at all.

    Raises:
      ValueError: data that are not those that were scored, a selection that is not there, a sample
        that cannot be read, a form that cannot hold what is selected.
    """
    config, workspace = job.config, job.workspace
    check_is_what_was_scored(workspace.root, job.task.load(config.dataset.train))
    cells = config.selection.cells()
    kept = {cell: read_selection(workspace, job.scored, cell) for cell in cells}
    steps = list(job.task.exports(kept, workspace.root))
    num_made = sum(workspace.ensure(step) is not None for step in steps)
    what = f"{num_made} exports of {len(kept)} selections written"
    workspace.say(f"export: {what if num_made else 'unchanged, not written again'}")
    workspace.say(f"files: {workspace.root / artefacts.EXPORTS}/")
