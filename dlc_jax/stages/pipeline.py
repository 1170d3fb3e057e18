"""The stages in order; what is on disk and still valid is not done again."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlc_jax import checks
from dlc_jax.checks.escaping import show
from dlc_jax.config import Config
from dlc_jax.stages.job import Job, Stage
from dlc_jax.stages.plan import run_plan
from dlc_jax.stages.report import print_summary, report_if_it_can, report_of_these_results
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.what_was_scored import check_names_what_was_scored
from dlc_jax.tasks import task_of
from dlc_jax.tasks.export_step import check_can_be_written
from dlc_jax.tasks.measurements import check_scores_are_whole
from dlc_jax.workspace import Workspace, artefacts

_BESIDE_SCORES = ("plan", "score", "report")  # run before there are scores, or on results.csv


def run(config: Config, workdir: Path, echo: Callable[[str], None] = show) -> None:
    """Runs `config.stages` and leaves their artefacts in the work directory.

    All processes of a run call this. The first one writes and prints; the others take part in
    scoring and training.

    Args:
      config: Checked configuration.
      workdir: Made if need be.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: anything wrong with the work directory, data, encoder or configuration.
    """
    workspace = Workspace.of(workdir, echo)
    if "plan" in config.stages:
        workspace.alone(lambda: run_plan(config, workspace.say))
        if config.stages == ("plan",):
            return
        rest = tuple(stage for stage in config.stages if stage != "plan")
        config = dataclasses.replace(config, stages=rest)
    if {"score", "finetune", "evaluate"} & set(config.stages):
        config.mesh.make()
    if "export" in config.stages:
        workspace.alone(lambda: check_can_be_written(config, workdir))
    with workspace.held():
        _run_stages(config, workspace)


def _run_stages(config: Config, workspace: Workspace) -> None:
    """Runs the stages in a work directory that nobody else writes to."""
    task = task_of(config, workspace.say)
    task.check(workspace)
    settings = (task.score(workspace) if "score" in config.stages else config).to_dict()
    job = Job(config, workspace, task)
    if config.stages == ("report",):
        workspace.alone(lambda: check_names_what_was_scored(job))
    else:
        with report_of_these_results(workspace):
            job.inputs = workspace.alone(lambda: _read_scores(job, settings))
            for name in config.data_kind.stages:
                if name in config.stages and name not in _BESIDE_SCORES:
                    stage: Stage = importlib.import_module(f"{__package__}.{name}")
                    stage.run(job)
                # of scores, and of a selection if there is one
                if name == "select" and {"score", "select"} & set(config.stages):
                    workspace.alone(lambda: print_summary(job))
    if "report" in config.stages:
        workspace.alone(lambda: report_if_it_can(job))
    if job.failures:
        lines = checks.listed(job.failures, "; ")
        raise checks.SharedError(f"{len(job.failures)} runs failed: {lines}")


def _read_scores(job: Job, settings: dict[str, Any]) -> SelectionInputs:
    """Reads the scores and writes `config.json`.

    The file gets the settings that scoring resolved; fine-tuning may use another encoder.
    """
    config, root = job.config, job.workspace.root
    check_scores_are_whole(root)
    samples = artefacts.read_scores(root)
    if "score" not in config.stages:  # the rest of the file still describes the scores
        check_names_what_was_scored(job)
        others = {"seed", "dataset", "encoder", "cache", "probe", "record", "mesh"}
        if "finetune" not in config.stages:
            others |= {"finetune", "lora"}
        if "evaluate" not in config.stages:
            others |= {"evaluation"}
        mine = {key: value for key, value in settings.items() if key not in others}
        found = artefacts.read_json(root / artefacts.CONFIG, {"dataset?": dict})
        if "finetune" in config.stages and "dataset" in found:
            mine["dataset"] = found["dataset"] | {"test": config.dataset.test}
        settings |= found | mine
    artefacts.write_json(root / artefacts.CONFIG, settings)
    return SelectionInputs(config, root, samples)
