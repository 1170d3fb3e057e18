"""The stages in order, and whether the configuration names what was scored.

Scoring is the task's own (`Task.score`), planning is `run_plan`; every other stage is the `run` of
the module of its name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.encoders.converted import is_converted
from dlc_jax.masking import AUTO
from dlc_jax.planning.machine import MeshSize
from dlc_jax.stages.report import print_summary, report_if_it_can, report_of_these_results
from dlc_jax.stages.select import Job, SelectionInputs
from dlc_jax.tasks import measurements, task_of
from dlc_jax.tasks.exports import check_can_be_written
from dlc_jax.workspace import Workspace, artefacts, records

_BESIDE_SCORES = ("plan", "score", "report")  # run before there are scores, or on results.csv
_IN_ALL_PROCESSES = ("finetune", "evaluate")  # of the others, which run in the first


def run(config: Config, workdir: Path, echo: Callable[[str], None] = expect.show) -> None:
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


def run_plan(config: Config, echo: Callable[[str], None]) -> None:
    """Prints what the stages asked for would take, or all if there are no others.

    Lists the data, decodes a few images and runs a program on made-up ones for two seconds. Nothing
    is written.

    Raises:
      ValueError: no such data or model; or, after everything is printed, what does not fit, and
        which setting to turn.
    """
    mesh = MeshSize.of(config.mesh)
    if config.probe.num_probes == AUTO:
        probe = config.probe
        counts = probe.for_mode(config.mode).counts(10**9)  # so many that rounding cuts no step off
        probe = dataclasses.replace(probe, num_probes=len(counts.grid), placement="grid")
        config = dataclasses.replace(config, probe=probe)
        echo("plan: probe.num_probes=auto may stop at 5 probes; planned for all of the path")
    problems = task_of(config, echo).plan(mesh).print(echo, details=config.plan_details)
    if mesh.note is not None:
        echo(mesh.note)
    if problems:
        raise expect.InputError(f"plan: does not fit: {'; '.join(problems)}")


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
            asked = {*config.stages}
            if "select" in asked and config.need.tuning:  # `auto` is found first
                asked.add("tune")
            for name in config.data_kind.stages:
                if name in asked - {*_BESIDE_SCORES}:
                    stage = importlib.import_module(f"{__package__}.{name}")
                    if name in _IN_ALL_PROCESSES:
                        stage.run(job)
                    else:
                        workspace.alone(functools.partial(stage.run, job))
                # of scores, and of a selection if there is one
                if name == "select" and {"score", "select"} & set(config.stages):
                    workspace.alone(lambda: print_summary(job))
    if "report" in config.stages:
        workspace.alone(lambda: report_if_it_can(job))
    if job.failures:
        lines = expect.listed(job.failures, "; ")
        raise expect.SharedError(f"{len(job.failures)} runs failed: {lines}")


def _read_scores(job: Job, settings: dict[str, Any]) -> SelectionInputs:
    """Reads the scores and writes `config.json`.

    The file gets the settings that scoring resolved; fine-tuning may use another encoder.
    """
    config, root = job.config, job.workspace.root
    measurements.check_scores_are_whole(root)
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


_Settings: TypeAlias = dict[str, Any]
_Names: TypeAlias = tuple[str, str]  # in the configuration, and of what was scored
_SETTINGS = {
    "asked": {"dataset": {"train": str}, "encoder": {"name": (str, None), "weights": str}},
    "encoder?": dict,
    "probe": dict,
    "seed": int,
}
# Settings that do not say which samples there are.
_NOT_OF_DATA = ("train", "test", "on_corrupt")
_ELSEWHERE = "Run the stages 'score' and 'select' with it, in another work directory."


def check_names_what_was_scored(job: Job) -> None:
    """Compares what is named with what was scored; reads data and weights where names differ.

    What the configuration leaves empty is not compared. Other probe settings are noted: what
    follows uses the scores that are there. Where an encoder is fine-tuned or evaluated, or that is
    reported, the configuration names that one, which may be another than was scored.

    Raises:
      ValueError: another data set or encoder, naming both.
    """
    config, (workdir, echo) = job.config, job.workspace
    known = records.settings_of(workdir, "score", _SETTINGS)
    if known is None:
        return
    if config.dataset.train:
        _check_dataset(job, known)
    names_trained = {"finetune", "evaluate"} & set(config.stages) or config.stages == ("report",)
    if (config.encoder.weights or is_converted(config.encoder.name)) and not names_trained:
        _check_encoder(job, known)
    _note_probes(config, known, echo)


def _check_dataset(job: Job, known: _Settings) -> None:
    config, theirs = job.config, known["asked"]["dataset"]
    mine, names = config.asked["dataset"], (config.dataset.train, theirs["train"])
    others: tuple[str, ...] = _NOT_OF_DATA
    if config.dataset.deep_images == config.conventions.deep_images:  # the mode's, not asked for
        others += ("deep_images",)
    compared = {name: value for name, value in mine.items() if name not in others}
    _compare("dataset", compared, theirs, names, job)
    if names[0] != names[1]:
        data = _loaded("dataset.train", names, job, lambda: job.task.load(names[0]))
        measurements.check_is_what_was_scored(job.workspace.root, data)


def _check_encoder(job: Job, known: _Settings) -> None:
    mine = job.config.asked["encoder"]
    # older ones knew no other
    theirs = {"transform": "paper", "prunable": None} | known["asked"]["encoder"]
    named, scored = (
        " ".join(filter(None, (encoder["name"], encoder["weights"]))) for encoder in (mine, theirs)
    )
    used = theirs | known.get("encoder", {}) | {"max_length": known.get("max_length")}
    others = (name for name in job.task.encoder_settings if mine[name] != used.get(name))
    _compare("encoder", {name: mine[name] for name in others}, theirs, (named, scored), job)
    if (mine["name"], mine["weights"]) == (theirs["name"], theirs["weights"]):
        return
    workdir, load = job.workspace.root, job.task.encoder_fingerprint
    fingerprint = _loaded("encoder.weights", (named, scored), job, load)
    expected = measurements.scored_facts(workdir, "encoder").get("fingerprint", fingerprint)
    if fingerprint != expected:
        raise expect.InputError(
            f"encoder.weights: {named} is not what was scored in {workdir}: its fingerprint is "
            f"{fingerprint[:12]}, expected {expected[:12]} ({scored}). {_ELSEWHERE}"
        )


def _compare(section: str, mine: _Settings, theirs: _Settings, names: _Names, job: Job) -> None:
    """Raises ValueError for a setting that is not what was asked for when it was scored."""
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            raise expect.InputError(
                f"{section}.{name}: {mine[name]!r} ({names[0]}) is not what was scored in "
                f"{job.workspace.root}, expected {theirs[name]!r} ({names[1]}). {_ELSEWHERE}"
            )


def _loaded(key: str, names: _Names, job: Job, load: Callable[[], Any]) -> Any:
    """Loads what has another name than what was scored, and may be the same."""
    try:
        return load()
    except expect.InputError as error:
        raise expect.InputError(
            f"{key}: {names[0]} is not what was scored in {job.workspace.root}, {names[1]}, and "
            f"cannot be compared with it: {error}"
        ) from error


def _note_probes(config: Config, known: _Settings, echo: Callable[[str], None]) -> None:
    """Notes settings of probes that differ from those of the scores."""
    mine = config.to_dict()["probe"] | {"seed": config.seed}
    theirs = known["probe"] | {"seed": known["seed"]}
    others = {*measurements.NOT_IN_LOSSES}
    if config.mode != known.get("mode", config.mode):
        others.add("schedule")  # the mode decides it, and the stage select notes another mode
    if config.probe.num_probes != AUTO:
        others.add("agreement")
    if config.probe.masking != "random":
        others.add("seed")
    differ = sorted(n for n in mine.keys() & theirs.keys() - others if mine[n] != theirs[n])
    if differ:
        there, here = (", ".join(f"{n} {some[n]}" for n in differ) for some in (theirs, mine))
        echo(f"note: the scores are of probes with {there}; the configuration says {here}")
