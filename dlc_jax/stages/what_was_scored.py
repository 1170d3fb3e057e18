"""Whether a configuration names the data and the encoder that the scores on disk are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.masking import AUTO
from dlc_jax.stages.job import Job
from dlc_jax.tasks.measurements import NOT_IN_LOSSES, check_is_what_was_scored, scored_facts
from dlc_jax.workspace import records

_Settings: TypeAlias = dict[str, Any]
_Names: TypeAlias = tuple[str, str]  # in the configuration, and of what was scored
_SETTINGS = {
    "asked": {"dataset": {"train": str}, "encoder": {"name": str, "weights": str}},
    "encoder?": dict,
    "probe": dict,
    "seed": int,
}
# Settings that do not decide the losses.
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
    if config.encoder.weights and not names_trained:
        _check_encoder(job, known)
    _note_probes(config, known, echo)


def _check_dataset(job: Job, known: _Settings) -> None:
    config, theirs, workdir = job.config, known["asked"]["dataset"], job.workspace.root
    mine, names = config.asked["dataset"], (config.dataset.train, theirs["train"])
    others: tuple[str, ...] = _NOT_OF_DATA
    if config.dataset.deep_images == config.conventions.deep_images:  # the mode's, not asked for
        others += ("deep_images",)
    compared = {name: value for name, value in mine.items() if name not in others}
    _compare("dataset", compared, theirs, {}, names, workdir)
    if names[0] != names[1]:
        data = _loaded("dataset.train", names, workdir, lambda: job.task.load(names[0]))
        check_is_what_was_scored(workdir, data)


def _check_encoder(job: Job, known: _Settings) -> None:
    theirs, mine = known["asked"]["encoder"], job.config.asked["encoder"]
    named, scored = (f"{encoder['name']} {encoder['weights']}" for encoder in (mine, theirs))
    compared = {name: mine[name] for name in job.task.encoder_settings}
    decided = {**known.get("encoder", {}), "max_length": known.get("max_length")}
    workdir = job.workspace.root
    _compare("encoder", compared, theirs, decided, (named, scored), workdir)
    if (mine["name"], mine["weights"]) == (theirs["name"], theirs["weights"]):
        return
    load = job.task.encoder_fingerprint
    fingerprint = _loaded("encoder.weights", (named, scored), workdir, load)
    expected = scored_facts(workdir, "encoder").get("fingerprint", fingerprint)
    if fingerprint != expected:
        raise checks.InputError(
            f"encoder.weights: {named} is not what was scored in {workdir}: its fingerprint is "
            f"{fingerprint[:12]}, expected {expected[:12]} ({scored}). {_ELSEWHERE}"
        )


def _compare(
    section: str,
    mine: _Settings,
    theirs: _Settings,
    decided: _Settings,
    names: _Names,
    workdir: Path,
) -> None:
    """Raises ValueError for a setting that is neither what was asked for nor what came of it."""
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] not in (theirs[name], decided.get(name, theirs[name])):
            raise checks.InputError(
                f"{section}.{name}: {mine[name]!r} ({names[0]}) is not what was scored in "
                f"{workdir}, expected {theirs[name]!r} ({names[1]}). {_ELSEWHERE}"
            )


def _loaded(key: str, names: _Names, workdir: Path, load: Callable[[], Any]) -> Any:
    """Loads what has another name than what was scored, and may be the same."""
    try:
        return load()
    except checks.InputError as error:
        raise checks.InputError(
            f"{key}: {names[0]} is not what was scored in {workdir}, {names[1]}, and cannot be "
            f"compared with it: {error}"
        ) from error


def _note_probes(config: Config, known: _Settings, echo: Callable[[str], None]) -> None:
    """Notes settings of probes that differ from those of the scores."""
    mine = config.to_dict()["probe"] | {"seed": config.seed}
    theirs = known["probe"] | {"seed": known["seed"]}
    others = {*NOT_IN_LOSSES}
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
