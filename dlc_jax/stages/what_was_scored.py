"""Whether a configuration names the data and the encoder that the scores on disk are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.encoders.language_model import load_language_model
from dlc_jax.masking import AUTO
from dlc_jax.stages.measurements import NOT_IN_LOSSES
from dlc_jax.stages.score import Load, load_configured
from dlc_jax.stages.score_instructions import load_configured_instructions
from dlc_jax.types import Dataset
from dlc_jax.workspace import records

_SETTINGS = {
    "asked": {"dataset": {"train": str}, "encoder": {"name": str, "weights": str}},
    "encoder?": dict,
    "probe": dict,
    "seed": int,
}
_FACTS = {
    "dataset?": {"source": str, "fingerprint": str, "skipped?": dict},
    "encoder?": {"name": str, "fingerprint": str},
}
# Settings that do not decide the losses, by what is scored.
_NOT_OF_DATA = ("train", "test", "on_corrupt")
_NOT_OF_ENCODER = {
    True: ("weights", "image_size", "pooling", "mean", "std"),
    False: ("name", "weights", "max_length"),
}
_ELSEWHERE = "Run the stages 'score' and 'select' with it, in another work directory."


def check_names_what_was_scored(
    config: Config, workdir: Path, load: Load, echo: Callable[[str], None]
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
        _check_dataset(config, workdir, known, load)
    names_trained = {"finetune", "evaluate"} & set(config.stages) or config.stages == ("report",)
    if config.encoder.weights and not names_trained:
        _check_encoder(config, workdir, known)
    _note_probes(config, known, echo)


def _check_dataset(config: Config, workdir: Path, known: dict[str, Any], load: Load) -> None:
    theirs, source = known["asked"]["dataset"], config.dataset.train
    names = (source, theirs["train"])
    others: tuple[str, ...] = _NOT_OF_DATA
    if config.dataset.deep_images == config.conventions.deep_images:  # the mode's, not asked for
        others += ("deep_images",)
    _compare("dataset", config.asked["dataset"], theirs, {}, others, names, workdir)
    if source == theirs["train"]:
        return

    def found() -> Dataset | Instructions:
        if config.is_of_instructions:
            return load_configured_instructions(config, source)
        return load(source)

    data = _loaded("dataset.train", source, theirs["train"], workdir, found)
    check_is_what_was_scored(workdir, data)


def _check_encoder(config: Config, workdir: Path, known: dict[str, Any]) -> None:
    theirs, mine = known["asked"]["encoder"], config.asked["encoder"]
    decided = {**known.get("encoder", {}), "max_length": known.get("max_length")}
    others = _NOT_OF_ENCODER[config.is_of_instructions]
    named, scored = (f"{encoder['name']} {encoder['weights']}" for encoder in (mine, theirs))
    _compare("encoder", mine, theirs, decided, others, (named, scored), workdir)
    if (mine["name"], mine["weights"]) == (theirs["name"], theirs["weights"]):
        return

    def found() -> str:
        if config.is_of_instructions:
            return load_language_model(mine["weights"], dtype=config.probe.dtype).fingerprint
        return load_configured(config).for_mode(config.mode).fingerprint

    fingerprint = _loaded("encoder.weights", named, scored, workdir, found)
    expected = _scored(workdir, "encoder").get("fingerprint", fingerprint)
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


def check_is_what_was_scored(workdir: Path, dataset: Dataset | Instructions) -> None:
    """Raises unless the data set is the one that the scores in the work directory are of."""
    scored = _scored(workdir, "dataset")
    fingerprint = scored.get("fingerprint", dataset.fingerprint)
    if fingerprint != dataset.fingerprint:
        raise checks.InputError(
            f"dataset.train: {dataset.name} is not what was scored in {workdir}: its fingerprint "
            f"is {dataset.fingerprint[:12]}, expected {fingerprint[:12]} ({scored.get('source')}). "
            "Run the stages 'score' and 'select' on it, in another work directory."
        )


def _scored(workdir: Path, what: str) -> dict[str, Any]:
    """Returns the facts about the data set or encoder that was scored, {} of scores without."""
    found: dict[str, Any] = records.facts_of(workdir, "score", _FACTS).get(what, {})
    return found


def skipped_samples(workdir: Path) -> dict[str, str]:
    """Returns the ids of samples that were left out when the others were scored, and why."""
    skipped: dict[str, str] = _scored(workdir, "dataset").get("skipped", {})
    return skipped


def scored_encoder(workdir: Path, fingerprint: str) -> str | None:
    """Returns name and weights of the encoder that was scored; None if it has this fingerprint."""
    scored = _scored(workdir, "encoder")
    if scored.get("fingerprint", fingerprint) == fingerprint:
        return None
    return " ".join(str(scored[key]) for key in ("name", "weights") if key in scored)
