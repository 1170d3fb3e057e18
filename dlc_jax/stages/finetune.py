"""The stage `finetune`: a run per selected cell and one on everything."""

from __future__ import annotations

from dlc_jax import checks
from dlc_jax.checks.escaping import visible
from dlc_jax.distributed import said_of
from dlc_jax.stages.job import Job
from dlc_jax.stages.sweep import Sweep
from dlc_jax.stages.sweep_results import BASE_CELL, write_results
from dlc_jax.tasks.measurements import check_is_what_was_scored
from dlc_jax.workspace import artefacts, records


def run(job: Job) -> None:
    """Fine-tunes on every cell; adds a line to `job.failures` for each run that fails.

    Runs what is not finished yet. Leaves `finetune/<method>/<cell>/`, and rewrites `results.csv`
    after every run.

    Raises:
      ValueError: what no run can do without: data that are not those that were scored, a test set
        that does not fit; or every run failed.
    """
    config, workspace = job.config, job.workspace
    workdir, echo = workspace
    training = job.task.training(workspace)

    def prepare() -> None:
        """Sets aside the answers of another model before it was fine-tuned; checks the data."""
        record = records.read(workdir, f"{artefacts.EVALUATE}/{BASE_CELL.name}")
        if record is not None and record.key.get("run") != training.fingerprint:
            workspace.set_aside(record)
        check_is_what_was_scored(workdir, training.data)

    workspace.alone(prepare)
    sweep = Sweep(job, training.make_trainer())
    workspace.alone(sweep.make_room)
    cells = config.runs()
    echo(f"finetune: {len(cells)} runs on {said_of(config.mesh.make())}")
    for note in sweep.trainer.notes:
        echo(visible(f"finetune: {note}"))
    failures = sweep.run_all(cells)
    if len(failures) == len(cells):
        raise checks.SharedError(f"all {len(cells)} runs failed, first {failures[0]}")
    seconds = workspace.broadcast(  # of all finished runs, whenever they ran
        lambda: float(sum(row["seconds"] for row in write_results(workdir)))
    )
    workspace.note("finetune", training.settings, seconds, training.facts())
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    job.failures += failures
