"""What ran, with what, on what: `provenance.json`, by which stages know that they are done."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import dlc_jax
from dlc_jax import artefacts, checks
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.types import Dataset

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
)

# What parts of the stage `score` leave, for messages.
_MADE = {"features": "features", "training": "record of training"}


def stage_record(workdir: Path, stage: str) -> dict[str, Any] | None:
    """Returns what the provenance says of a stage; None if it did not run."""
    return artefacts.read_json(workdir / artefacts.PROVENANCE).get("stages", {}).get(stage)


def is_done(workdir: Path, stage: str, inputs: str) -> bool:
    """Whether the stage ran on the same inputs and its files are as it left them."""
    record = stage_record(workdir, stage)
    return (
        record is not None
        and record["inputs"] == inputs
        and artefacts.are_intact(workdir, record["outputs"])
    )


def record(
    workdir: Path,
    stage: str,
    inputs: str,
    paths: list[Path],
    seconds: float,
    facts: dict[str, Any],
    made_with: dict[str, Any],
) -> None:
    """Adds what a stage did to the provenance, which is what makes the stage count as done."""
    path = workdir / artefacts.PROVENANCE
    provenance = artefacts.read_json(path)
    provenance.update(facts)
    provenance["versions"] = {
        "dlc_jax": dlc_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }
    provenance["devices"] = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    provenance.setdefault("stages", {})[stage] = {
        "inputs": inputs,
        "settings": made_with,
        "versions": provenance["versions"],
        "devices": provenance["devices"],
        "seconds": round(seconds, 3),
        "outputs": artefacts.file_hashes(workdir, paths),
    }
    artefacts.write_json(path, provenance)


def _made_of(record: dict[str, Any] | None) -> Any:
    """Returns what a part of the stage `score` was made of: data, encoder, how images are seen."""
    return None if record is None else record["settings"].get("made_of")


def forget(workdir: Path, stage: str) -> None:
    """Takes a stage out of the provenance: what it left does not count any more."""
    path = workdir / artefacts.PROVENANCE
    provenance = artefacts.read_json(path)
    if provenance.get("stages", {}).pop(stage, None) is not None:
        artefacts.write_json(path, provenance)


def check_is_whole(workdir: Path, stage: str) -> None:
    """Raises unless the stage ran on what was scored, and its files are as it left them."""
    record, score = stage_record(workdir, stage), stage_record(workdir, "score")
    is_theirs = record is not None and _made_of(record) == _made_of(score)
    if record is None or not is_theirs or not artefacts.are_intact(workdir, record["outputs"]):
        raise checks.InputError(
            f"{workdir}/scores: has no {_MADE[stage]} of these scores; run the stage 'score' with "
            "the same settings of selection and tuning first."
        )


def refresh(workdir: Path, stage: str) -> None:
    """Takes note of a stage's files as they are now, after another stage added to them."""
    path = workdir / artefacts.PROVENANCE
    provenance = artefacts.read_json(path)
    outputs = provenance["stages"][stage]["outputs"]
    provenance["stages"][stage]["outputs"] = artefacts.file_hashes(
        workdir, [Path(name) for name in outputs]
    )
    artefacts.write_json(path, provenance)


def pruning_seconds(workdir: Path) -> dict[str, float]:
    """Returns what it took to know what to keep, by the name of the cell, as `select` left it."""
    told = artefacts.read_json(workdir / artefacts.PROVENANCE)
    seconds: dict[str, float] = told.get("pruning_seconds", {})
    return seconds


def seconds(workdir: Path, stages: Iterable[str]) -> float:
    """Returns what these stages took when they last ran, 0 for those that never did."""
    known = artefacts.read_json(workdir / artefacts.PROVENANCE).get("stages", {})
    return sum(known[stage]["seconds"] for stage in stages if stage in known)


def check_is_what_was_scored(workdir: Path, dataset: Dataset | Instructions) -> None:
    """Raises unless the data set is the one that the scores in the work directory are of."""
    scored = artefacts.read_json(workdir / artefacts.PROVENANCE).get("dataset", {})
    fingerprint = scored.get("fingerprint", dataset.fingerprint)
    if fingerprint != dataset.fingerprint:
        raise checks.InputError(
            f"dataset.train: {dataset.name} is not what was scored in {workdir}: its fingerprint "
            f"is {dataset.fingerprint[:12]}, expected {fingerprint[:12]} ({scored.get('source')}). "
            "Run the stages 'score' and 'select' on it, in another work directory."
        )


def scored_encoder(workdir: Path, fingerprint: str) -> str | None:
    """Returns name and weights of the encoder that was scored; None if it has this fingerprint."""
    scored = artefacts.read_json(workdir / artefacts.PROVENANCE).get("encoder", {})
    if scored.get("fingerprint", fingerprint) == fingerprint:
        return None
    return " ".join(str(scored[key]) for key in ("name", "weights") if key in scored)
