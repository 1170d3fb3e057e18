"""The stage `finetune`: a run per selected cell and one on everything."""

from __future__ import annotations

from dlc_jax.stages.job import Job
from dlc_jax.stages.sweep import run_sweep
from dlc_jax.stages.sweep_results import BASE_CELL
from dlc_jax.workspace import Workspace, artefacts, records


def run(job: Job) -> None:
    """Fine-tunes on every cell; adds a line to `job.failures` for each run that fails.

    Leaves `finetune/<method>/<cell>/` and `results.csv`.

    Raises:
      ValueError: see `run_sweep`.
    """
    workspace = job.workspace
    training = job.task.training(workspace)
    workspace.alone(lambda: _set_other_base_aside(workspace, training.fingerprint))
    end = run_sweep(job.config, workspace, job.inputs, training)
    workspace.note("finetune", training.settings, end.seconds, training.facts())
    workspace.say(f"files: {workspace.root}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    job.failures += end.failures


def _set_other_base_aside(workspace: Workspace, fingerprint: str) -> None:
    """Sets aside the answers of another model before it was fine-tuned."""
    record = records.read(workspace.root, f"{artefacts.EVALUATE}/{BASE_CELL.name}")
    if record is not None and record.key.get("run") != fingerprint:
        workspace.set_aside(record)
