"""What ran, with what, on what: `provenance.json`, by which stages know that they are done."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dlc_jax import checks
from dlc_jax.files.json_files import BELOW, NAME, SHA256, Shape, check_shape, read_json
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts

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

# What later stages read of a stage; other stages need only the files that they recorded.
_LEAVES = {
    "score": (artefacts.LOSSES, artefacts.SCORES),
    "features": (artefacts.FEATURES,),
    "training": (f"{artefacts.TRAINING}/record.npz",),
    "tune": (f"{artefacts.TUNING}/tuning.json",),
}
_STAGE = {
    "inputs": str,
    "settings": {"mode?": str, "made_of?": dict, "keep_fractions?": [float]},
    "seconds": float,
    "outputs": {BELOW: SHA256},
}
_PROVENANCE = {
    "dataset?": {"source": str, "fingerprint": str, "skipped?": dict},
    "encoder?": {"name": str, "fingerprint": str},
    "pruning_seconds?": {NAME: float},
    "stages?": {NAME: _STAGE},
}


def read(workdir: Path) -> dict[str, Any]:
    """Returns `provenance.json`, {} if there is none; ValueError names what is damaged in it."""
    found: dict[str, Any] = read_json(workdir / artefacts.PROVENANCE, _PROVENANCE)
    return found


def stage_record(workdir: Path, stage: str) -> dict[str, Any] | None:
    """Returns what the provenance says of a stage; None if it did not run."""
    record: dict[str, Any] | None = read(workdir).get("stages", {}).get(stage)
    return record


def settings_of(workdir: Path, stage: str, shape: Shape) -> dict[str, Any] | None:
    """Returns the settings that a stage ran with; None if it did not run.

    Raises:
      ValueError: the settings do not have this shape.
    """
    record = stage_record(workdir, stage)
    if record is None:
        return None
    where = f"stages.{stage}.settings"
    check_shape(record["settings"], shape, workdir / artefacts.PROVENANCE, where)
    settings: dict[str, Any] = record["settings"]
    return settings


def is_intact(workdir: Path, stage: str, needed: Iterable[Path] = ()) -> bool:
    """Whether the stage ran and left the needed files, and all its files are as it left them."""
    record = stage_record(workdir, stage)
    needed = [*needed, *map(Path, _LEAVES.get(stage, ()))]
    if record is None or not record["outputs"]:
        return False
    return artefacts.are_intact(workdir, record["outputs"], needed)


def is_done(workdir: Path, stage: str, inputs: str, needed: Iterable[Path] = ()) -> bool:
    """Whether the stage ran on the same inputs and its files are as it left them.

    Args:
      workdir, stage: Where the record is, and of which stage.
      inputs: What decides what the stage leaves.
      needed: Files that it must have written, besides those that it always writes.
    """
    record = stage_record(workdir, stage)
    return record is not None and record["inputs"] == inputs and is_intact(workdir, stage, needed)


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
    provenance = read(workdir)
    provenance.update(facts)
    provenance["versions"] = {
        "dlc_jax": __version__,
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
    provenance = read(workdir)
    if provenance.get("stages", {}).pop(stage, None) is not None:
        artefacts.write_json(path, provenance)


def check_is_whole(workdir: Path, stage: str) -> None:
    """Raises unless the stage ran on what was scored, and its files are as it left them."""
    record, score = stage_record(workdir, stage), stage_record(workdir, "score")
    if _made_of(record) != _made_of(score) or not is_intact(workdir, stage):
        raise checks.InputError(
            f"{workdir}/scores: has no {_MADE[stage]} of these scores; run the stage 'score' with "
            "the same settings of selection and tuning first."
        )


def check_is_as_left(workdir: Path, stage: str, paths: list[Path]) -> None:
    """Raises unless files are as the stage left them; those that its record lacks are not read."""
    record = stage_record(workdir, stage)
    outputs = {} if record is None else record["outputs"]
    expected = {name: outputs[name] for name in map(Path.as_posix, paths) if name in outputs}
    found = artefacts.file_hashes(workdir, [Path(name) for name in expected])
    if damage := artefacts.difference(expected, found):
        raise checks.InputError(f"{workdir}: {damage}; run the stage {stage!r} again.")


def refresh(workdir: Path, stage: str) -> None:
    """Takes note of a stage's files as they are now, after another stage added to them."""
    path = workdir / artefacts.PROVENANCE
    provenance = read(workdir)
    outputs = provenance["stages"][stage]["outputs"]
    provenance["stages"][stage]["outputs"] = artefacts.file_hashes(
        workdir, [Path(name) for name in outputs]
    )
    artefacts.write_json(path, provenance)


def pruning_seconds(workdir: Path) -> dict[str, float]:
    """Returns what it took to know what to keep, by the name of the cell, as `select` left it."""
    seconds: dict[str, float] = read(workdir).get("pruning_seconds", {})
    return seconds


def seconds(workdir: Path, stages: Iterable[str]) -> float:
    """Returns what these stages took when they last ran, 0 for those that never did."""
    known = read(workdir).get("stages", {})
    return sum(known[stage]["seconds"] for stage in stages if stage in known)
