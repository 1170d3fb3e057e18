"""The stages in order; what is on disk and still valid is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlc_jax import checks
from dlc_jax.checks.escaping import show
from dlc_jax.config import Config, DatasetConfig
from dlc_jax.datasets.files import left_out_text
from dlc_jax.distributed import processes
from dlc_jax.distributed.processes import on_first
from dlc_jax.stages.agreement import agree_on_images
from dlc_jax.stages.evaluate import check_questions, run_evaluate
from dlc_jax.stages.export import (
    check_has_forms,
    check_has_forms_instructions,
    check_takes_forms,
    run_exports,
    run_exports_instructions,
)
from dlc_jax.stages.finetune import (
    check_instructions,
    run_finetune,
    run_finetune_instructions,
    source_of_test_set,
)
from dlc_jax.stages.plan import run_plan
from dlc_jax.stages.report import print_summary, report_if_it_can, report_of_these_results
from dlc_jax.stages.score import (
    Load,
    check_scores_are_whole,
    run_score,
)
from dlc_jax.stages.score_instructions import run_score_instructions
from dlc_jax.stages.select import run_select
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.tune import run_tune
from dlc_jax.stages.what_was_scored import check_names_what_was_scored
from dlc_jax.training.images import class_ids_by_name
from dlc_jax.types import Dataset
from dlc_jax.workspace import artefacts, lease


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
    if not processes.is_first():
        echo = _say_nothing
    if "plan" in config.stages:
        on_first(lambda: run_plan(config, echo))
        if config.stages == ("plan",):
            return
        rest = tuple(stage for stage in config.stages if stage != "plan")
        config = dataclasses.replace(config, stages=rest)
    if {"score", "finetune", "evaluate"} & set(config.stages):
        config.mesh.make()
    on_first(lambda: check_takes_forms(config, workdir))
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(lease.held(lease.place_of(workdir), echo)))
        _run_stages(config, workdir, echo)


def _run_stages(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Runs the stages in a work directory that nobody else writes to."""
    on_first(lambda: artefacts.prepare_workdir(workdir))
    load = _Sources(config.dataset, echo)
    # a mistake in what comes later should not cost a scoring pass first
    if "export" in config.stages:
        on_first(lambda: _check_exports(config, workdir, load))
    if config.is_of_instructions:
        check_instructions(config)
        if "evaluate" in config.stages:
            check_questions(config)
    elif "finetune" in config.stages:
        class_ids_by_name(
            load.together(source_of_test_set(config)), load.together(config.dataset.train)
        )
    resolved = config
    if "score" in config.stages:
        if config.is_of_instructions:
            run_score_instructions(config, workdir, echo)
        else:
            resolved = run_score(config, workdir, load.together, echo)
    failures = []
    if config.stages == ("report",):
        on_first(lambda: check_names_what_was_scored(config, workdir, load, echo))
    else:
        with report_of_these_results(workdir):
            failures = _use_scores(config, resolved.to_dict(), workdir, load, echo)
    if "report" in config.stages:
        on_first(lambda: report_if_it_can(config, workdir, bool(failures), echo))
    if failures:
        raise checks.SharedError(f"{len(failures)} runs failed: {checks.joined(failures, '; ')}")


def _check_exports(config: Config, workdir: Path, load: Load) -> None:
    if config.is_of_instructions:
        check_has_forms_instructions(config)
    else:
        check_has_forms(config, workdir, load(config.dataset.train))


def _say_nothing(line: str) -> None:
    """Takes the lines of processes other than the first."""


def _use_scores(
    config: Config,
    settings: dict[str, Any],
    workdir: Path,
    load: _Sources,
    echo: Callable[[str], None],
) -> list[str]:
    """Runs what starts from scores on disk; returns a line for every run that failed.

    What scoring resolved is for `config.json`: another encoder may be fine-tuned than was scored.
    """
    known = on_first(lambda: _until_exports(config, settings, workdir, load, echo))
    failures = []
    if "finetune" in config.stages:
        if config.is_of_instructions:
            failures = run_finetune_instructions(config, workdir, known, echo)
        else:
            failures = run_finetune(config, workdir, known, load.together, echo)
    if "evaluate" in config.stages:
        run_evaluate(config, workdir, echo)
    return failures


def _until_exports(
    config: Config,
    settings: dict[str, Any],
    workdir: Path,
    load: Load,
    echo: Callable[[str], None],
) -> SelectionInputs:
    """Runs what one process does: tunes, selects, prints a summary and exports."""
    check_scores_are_whole(workdir)
    samples = artefacts.read_scores(workdir)
    if "score" not in config.stages:  # the rest of the file still describes the scores
        check_names_what_was_scored(config, workdir, load, echo)
        others = {"seed", "dataset", "encoder", "cache", "probe", "record", "mesh"}
        if "finetune" not in config.stages:
            others |= {"finetune", "lora"}
        if "evaluate" not in config.stages:
            others |= {"evaluation"}
        mine = {key: value for key, value in settings.items() if key not in others}
        found = artefacts.read_json(workdir / artefacts.CONFIG, {"dataset?": dict})
        if "finetune" in config.stages and "dataset" in found:
            mine["dataset"] = found["dataset"] | {"test": config.dataset.test}
        settings |= found | mine
    artefacts.write_json(workdir / artefacts.CONFIG, settings)
    tuning = None
    if "tune" in config.stages or ("select" in config.stages and config.need.tuning):
        tuning = run_tune(config, workdir, samples, load, echo)
    known, shown = SelectionInputs(config, workdir, samples, tuning), None
    if "select" in config.stages:
        shown = run_select(config, workdir, known, echo)
    if "score" in config.stages or "select" in config.stages:
        print_summary(workdir, samples, shown, config.is_of_instructions, echo)
    if "export" in config.stages:
        if config.is_of_instructions:
            run_exports_instructions(config, workdir, known, echo)
        else:
            run_exports(config, workdir, known, load(config.dataset.train), echo)
    return known
