"""The stages in order; what is on disk and still valid is not done again."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlc_jax import checks
from dlc_jax.checks.escaping import show
from dlc_jax.config import INSTRUCTION_STAGES, STAGES, Config, DatasetConfig
from dlc_jax.datasets.files import left_out_text
from dlc_jax.stages.agreement import agree_on_images
from dlc_jax.stages.evaluate import check_questions
from dlc_jax.stages.export import (
    check_has_forms,
    check_has_forms_instructions,
    check_takes_forms,
)
from dlc_jax.stages.finetune import (
    check_instructions,
    source_of_test_set,
)
from dlc_jax.stages.job import Job, Stage
from dlc_jax.stages.measurements import check_scores_are_whole
from dlc_jax.stages.plan import run_plan
from dlc_jax.stages.report import print_summary, report_if_it_can, report_of_these_results
from dlc_jax.stages.score import Load, run_score
from dlc_jax.stages.score_instructions import run_score_instructions
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.what_was_scored import check_names_what_was_scored
from dlc_jax.training.images import class_ids_by_name
from dlc_jax.types import Dataset
from dlc_jax.workspace import Workspace, artefacts

_BESIDE_SCORES = ("plan", "score", "report")  # run before there are scores, or on results.csv


class _Sources:
    """Data sets by source, loaded once: stages share them, and their fingerprints."""

    def __init__(self, settings: DatasetConfig, echo: Callable[[str], None]) -> None:
        self._settings, self._echo = settings, echo
        self._found: dict[str, Dataset] = {}
        self._shared: set[str] = set()

    def __call__(self, source: str) -> Dataset:
        if source not in self._found:
            self._found[source] = dataset = self._settings.load(source)
            if dataset.left_out:
                self._echo(f"{source}: left out: {left_out_text(dataset.left_out)}")
            if dataset.empty_classes:
                names = checks.listed(map(repr, dataset.empty_classes))
                self._echo(f"{source}: note: classes without samples, left out: {names}")
        return self._found[source]

    def together(self, source: str) -> Dataset:
        """Returns the data set in all processes at once, which must see the same samples."""
        dataset = self(source)
        if source not in self._shared:
            agree_on_images(dataset)
            self._shared.add(source)
        return dataset


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
    workspace.alone(lambda: check_takes_forms(config, workdir))
    with workspace.held():
        _run_stages(config, workspace)


def _run_stages(config: Config, workspace: Workspace) -> None:
    """Runs the stages in a work directory that nobody else writes to."""
    load = _Sources(config.dataset, workspace.say)
    # a mistake in what comes later should not cost a scoring pass first
    if "export" in config.stages:
        workspace.alone(lambda: _check_exports(config, workspace.root, load))
    if config.is_of_instructions:
        check_instructions(config)
        if "evaluate" in config.stages:
            check_questions(config)
    elif "finetune" in config.stages:
        class_ids_by_name(
            load.together(source_of_test_set(config)), load.together(config.dataset.train)
        )
    settings = config.to_dict()
    if "score" in config.stages:
        if config.is_of_instructions:
            run_score_instructions(config, workspace)
        else:
            settings = run_score(config, workspace, load.together).to_dict()
    job = Job(config, workspace, load, load.together)
    if config.stages == ("report",):
        workspace.alone(
            lambda: check_names_what_was_scored(config, workspace.root, load, workspace.say)
        )
    else:
        with report_of_these_results(workspace):
            job.known = workspace.alone(lambda: _read_scores(config, settings, workspace, load))
            for name in INSTRUCTION_STAGES if config.is_of_instructions else STAGES:
                if name in config.stages and name not in _BESIDE_SCORES:
                    stage: Stage = importlib.import_module(f"{__package__}.{name}")
                    stage.run(job)
                # of scores, and of a selection if there is one
                if name == "select" and {"score", "select"} & set(config.stages):
                    job.with_scores(functools.partial(_summarise, job))
    if "report" in config.stages:
        workspace.alone(lambda: report_if_it_can(config, workspace, bool(job.failures)))
    if job.failures:
        lines = checks.joined(job.failures, "; ")
        raise checks.SharedError(f"{len(job.failures)} runs failed: {lines}")


def _summarise(job: Job, known: SelectionInputs) -> None:
    print_summary(job.workspace, known.samples, job.shown, job.config.is_of_instructions)


def _check_exports(config: Config, workdir: Path, load: Load) -> None:
    if config.is_of_instructions:
        check_has_forms_instructions(config)
    else:
        check_has_forms(config, workdir, load(config.dataset.train))


def _read_scores(
    config: Config, settings: dict[str, Any], workspace: Workspace, load: Load
) -> SelectionInputs:
    """Reads the scores and writes `config.json`.

    The file gets the settings that scoring resolved; fine-tuning may use another encoder.
    """
    root = workspace.root
    check_scores_are_whole(root)
    samples = artefacts.read_scores(root)
    if "score" not in config.stages:  # the rest of the file still describes the scores
        check_names_what_was_scored(config, root, load, workspace.say)
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
