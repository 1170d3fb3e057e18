"""Whether a configuration names the data and the encoder that the scores on disk are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.masking import AUTO
from dlc_jax.tasks import Task
from dlc_jax.tasks.measurements import NOT_IN_LOSSES, check_is_what_was_scored, scored_facts
from dlc_jax.workspace import records

_SETTINGS = {
    "asked": {"dataset": {"train": str}, "encoder": {"name": str, "weights": str}},
    "encoder?": dict,
    "probe": dict,
    "seed": int,
}
# Settings that do not decide the losses.
_NOT_OF_DATA = ("train", "test", "on_corrupt")
_ELSEWHERE = "Run the stages 'score' and 'select' with it, in another work directory."


def check_names_what_was_scored(
    config: Config, workdir: Path, task: Task, echo: Callable[[str], None]
) -> None:
    """Compares what is named with what was scored; reads data and weights where names differ.

    What the configuration leaves empty is not compared. Other probe settings are noted: what
    follows uses the scores that are there. Where an encoder is fine-tuned or evaluated, or that is
    reported, the configuration names that one, which may be another than was scored.

    Raises:
      ValueError: another data set or encoder, naming both.
    """
    known = records.settings_of(workdir, "score", _SETTINGS)
    if known is None:
        return
    if config.dataset.train:
        _check_dataset(config, workdir, known, task)
    names_trained = {"finetune", "evaluate"} & set(config.stages) or config.stages == ("report",)
    if config.encoder.weights and not names_trained:
        _check_encoder(config, workdir, known, task)
    _note_probes(config, known, echo)


def _check_dataset(config: Config, workdir: Path, known: dict[str, Any], task: Task) -> None:
    theirs, source = known["asked"]["dataset"], config.dataset.train
    names = (source, theirs["train"])
    others: tuple[str, ...] = _NOT_OF_DATA
    if config.dataset.deep_images == config.conventions.deep_images:  # the mode's, not asked for
        others += ("deep_images",)
    _compare("dataset", config.asked["dataset"], theirs, {}, others, names, workdir)
    if source == theirs["train"]:
        return
    data = _loaded("dataset.train", source, theirs["train"], workdir, lambda: task.load(source))
    check_is_what_was_scored(workdir, data)


def _check_encoder(config: Config, workdir: Path, known: dict[str, Any], task: Task) -> None:
    theirs, mine = known["asked"]["encoder"], config.asked["encoder"]
    decided = {**known.get("encoder", {}), "max_length": known.get("max_length")}
    others = tuple(name for name in mine if name not in task.encoder_settings)
    named, scored = (f"{encoder['name']} {encoder['weights']}" for encoder in (mine, theirs))
    _compare("encoder", mine, theirs, decided, others, (named, scored), workdir)
    if (mine["name"], mine["weights"]) == (theirs["name"], theirs["weights"]):
        return
    fingerprint = _loaded("encoder.weights", named, scored, workdir, task.encoder_fingerprint)
    expected = scored_facts(workdir, "encoder").get("fingerprint", fingerprint)
    if fingerprint != expected:
        raise checks.InputError(
            f"encoder.weights: {named} is not what was scored in {workdir}: its fingerprint is "
            f"{fingerprint[:12]}, expected {expected[:12]} ({scored}). {_ELSEWHERE}"
        )


def _compare(
    section: str,
    mine: dict[str, Any],
    theirs: dict[str, Any],
    decided: dict[str, Any],
    others: tuple[str, ...],
    names: tuple[str, str],
    workdir: Path,
) -> None:
    """Raises ValueError for a setting that is neither what was asked for nor what came of it."""
    for name in sorted(mine.keys() & theirs.keys() - set(others)):
        if mine[name] not in (theirs[name], decided.get(name, theirs[name])):
            raise checks.InputError(
                f"{section}.{name}: {mine[name]!r} ({names[0]}) is not what was scored in "
                f"{workdir}, expected {theirs[name]!r} ({names[1]}). {_ELSEWHERE}"
            )


def _loaded(key: str, named: str, scored: str, workdir: Path, load: Callable[[], Any]) -> Any:
    """Loads what has another name than what was scored, and may be the same."""
    try:
        return load()
    except checks.InputError as error:
        raise checks.InputError(
            f"{key}: {named} is not what was scored in {workdir}, {scored}, and cannot be compared "
            f"with it: {error}"
        ) from error


def _note_probes(config: Config, known: dict[str, Any], echo: Callable[[str], None]) -> None:
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
        there = ", ".join(f"{name} {theirs[name]}" for name in differ)
        here = ", ".join(f"{name} {mine[name]}" for name in differ)
        echo(f"note: the scores are of probes with {there}; the configuration says {here}")
