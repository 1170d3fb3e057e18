"""Records of results: one JSON file each below `records/`, written last, so that it is the commit.

A result is valid while its record has the requested key and its files match the recorded SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

from dlc_jax import expect
from dlc_jax.files.json_files import BELOW, NAME, SHA256, Shape, check_shape, read_json
from dlc_jax.workspace import artefacts

FOLDER = "records"
# Name of the step that fills a work directory by itself, and has its record beside its files.
RUN = "run"
RESULT = "result"  # fact that such a record has once its run is finished
SUPERSEDED = "superseded"
# Entry of a key in which steps of one sweep differ; they share the others.
CELL = "cell"
_WORDS = re.compile(r"[a-z]+([ -][a-z]+)*")  # it names a folder of `superseded/`
_MISSING = object()
Value = TypeVar("Value")

_FIELDS = {
    "step": str,
    "kind": _WORDS,
    "number": int,
    "key": dict,
    "settings": dict,
    "outputs": {BELOW: SHA256},
    "seconds": float,
    "versions": {NAME: str},
    "devices": [str],
}


class Written(NamedTuple):
    """What a step has written.

    Attributes:
      files: Paths below the work directory.
      facts: Facts about the result that its record keeps for readers.
      seconds: Time that the result took over all runs; None: the time of this call.
    """

    files: Iterable[str]
    facts: Mapping[str, Any] = {}
    seconds: float | None = None


@runtime_checkable
class Step(Protocol[Value]):
    """A result to compute and write; knows neither processes nor whether it is there.

    Attributes:
      name: Path of the record below `records/`, without its suffix.
      kind: Kind of result; `artefacts.result_number` gives its number.
      stage: Stage of the command that makes it, for messages.
      key: Everything that decides the result, as JSON has it.
      settings: Settings as the user knows them, for readers.
      files: Paths, below the work directory, that it always writes.
      obsolete: Files and folders there that nothing needs once the result is recorded.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def key(self) -> Mapping[str, Any]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def obsolete(self) -> tuple[str, ...]: ...

    def compute(self, scratch: Path, /) -> Value:
        """Computes the result, in all processes, which share a folder for what is unfinished."""

    def write(self, root: Path, value: Value, /) -> Written:
        """Writes the result below the work directory, in the first process."""


@runtime_checkable
class FolderStep(Step[Value], Protocol[Value]):
    """A step called `RUN` that fills a folder by itself, what is unfinished of it too.

    Attributes:
      optional: Folders whose files may be missing, or are about to be deleted.
      facts: Facts that its record has from the start.
    """

    @property
    def optional(self) -> tuple[str, ...]: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...

    def compute(self, scratch: Path | None, /) -> Value:
        """Computes the result, in all processes; the first alone is given the folder."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What was made, from what, with what, and the SHA-256 of every file written.

    Attributes: see `Step`.
      number: Result number of the kind.
      outputs: SHA-256 by path below the work directory.
      facts: See `Written`.
      seconds: Time that the result took.
      versions, devices: Packages and devices that made it.
    """

    step: str
    kind: str
    number: int
    key: dict[str, Any]
    settings: dict[str, Any]
    outputs: dict[str, str]
    seconds: float
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: artefacts.versions())
    devices: list[str] = dataclasses.field(default_factory=lambda: artefacts.devices())
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, step: Step[Any], written: Written, seconds: float = 0.0) -> Record:
        """Returns the record of a step whose files have been written, or of one that begins."""
        taken = seconds if written.seconds is None else written.seconds
        return cls(
            step=step.name,
            kind=step.kind,
            number=artefacts.result_number(step.kind),
            key=_key_of(step),
            settings=as_json(step.settings),
            outputs=_hashes(root, written.files),
            seconds=round(taken, 3),
            facts=as_json(written.facts),
        )

    @property
    def identity(self) -> str:
        """SHA-256 of the key."""
        return artefacts.json_hash(self.key)

    def difference(self, step: Step[Any]) -> str | None:
        """Returns a phrase for the first thing in which the step differs; None if it does not."""
        if self.step != step.name:
            return f"is of {self.step}, expected {step.name}"
        number = artefacts.result_number(step.kind)
        if self.kind != step.kind:
            return f"is of kind {self.kind!r}, expected {step.kind!r}"
        if self.number != number:
            return f"was made under result number {self.number}, expected {number}"
        return _first_difference(self.key, _key_of(step))

    def damage(self, root: Path, optional: tuple[str, ...] = (), between: str = " ") -> str | None:
        """Returns a phrase for the first file that is not as it was written; None if all are.

        Args:
          root: Work directory.
          optional: Files, and folders whose files, are not compared.
          between: Text between the file and what is wrong with it.
        """
        outputs = {
            name: sha
            for name, sha in self.outputs.items()
            if not any(name == some or name.startswith(f"{some}/") for some in optional)
        }
        there = [name for name in outputs if os.path.isfile(root / name)]
        return artefacts.difference(outputs, _hashes(root, there), between)

    def write(self, root: Path) -> None:
        """Writes the record, facts first."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        artefacts.write_json(root / file_of(self.step), self.facts | fields)


def _hashes(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of files, of symbolic links that of where they lead."""

    def sha(path: Path) -> str:
        if path.is_symlink():
            return hashlib.sha256(os.readlink(path).encode()).hexdigest()
        return artefacts.file_hash(path)

    return {name: sha(root / name) for name in names}


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as reading them from a JSON file would."""
    return json.loads(json.dumps(artefacts.finite(value), default=artefacts.plain))


def is_run(step: Step[Any]) -> TypeGuard[FolderStep[Any]]:
    """Whether a step fills a folder by itself; does not look at its other attributes."""
    return step.name == RUN


def identity_of(step: Step[Any]) -> str:
    """Returns the identity of the record that a step would have."""
    return artefacts.json_hash(_key_of(step))


def file_of(name: str) -> str:
    """Returns the path of a record below the work directory."""
    return f"{name}.json" if name == RUN else f"{FOLDER}/{name}.json"


def read(root: Path, name: str) -> Record | None:
    """Returns a record; None if there is none.

    Raises:
      ValueError: it is damaged.
    """
    found = read_json(root / file_of(name))
    if not found:
        return None
    if name == RUN and "step" not in found and "inputs" in found:
        raise expect.InputError(
            f"{root / file_of(name)}: was written by dlc_jax 0.1, whose runs this version does not "
            "resume; expected an empty folder."
        )
    check_shape(found, _FIELDS, root / file_of(name))
    facts = {field: value for field, value in found.items() if field not in _FIELDS}
    return Record(**{field: found[field] for field in _FIELDS}, facts=facts)


def matching(root: Path, pattern: str) -> list[Record]:
    """Returns the records whose names match, such as `selections/*/*`, sorted by name.

    Raises:
      ValueError: one is damaged.
    """
    top = root / FOLDER
    paths = sorted(path.relative_to(top) for path in top.glob(f"{pattern}.json"))
    names = [path.as_posix().removesuffix(".json") for path in paths]
    # a record that was copied from elsewhere proves nothing
    return [record for name in names if (record := read(root, name)) and record.step == name]


def settings_of(
    root: Path, name: str, shape: Shape, part: str = "settings"
) -> dict[str, Any] | None:
    """Returns the settings, or another part, of a record; None if there is none.

    Raises:
      ValueError: the part does not have this shape.
    """
    record = read(root, name)
    if record is None:
        return None
    found = getattr(record, part)
    check_shape(found, shape, root / file_of(name), part)
    return found


def reason_to_make(root: Path, step: Step[Any]) -> str | None:
    """Returns why a step's result does not count, None if it does.

    Raises:
      ValueError: its record is damaged.
    """
    record = read(root, step.name)
    place = root / file_of(step.name)
    if record is None:
        what = f"{root / step.files[0]}: " if step.files else ""
        return f"{what}{place} is missing, which records how it was made"
    if difference := record.difference(step):
        return f"{place}: {difference}"
    if missing := sorted({*step.files} - record.outputs.keys()):
        return f"{place}: has no checksum of {missing[0]}"
    optional = step.optional if is_run(step) else ()
    damage = record.damage(root, optional, ": ")
    return None if damage is None else f"{root}/{damage}"


def check_beside_run(folder: Path) -> None:
    """Raises ValueError unless a folder beside `run.json` holds what the run left there.

    Unfinished runs, and `run.json` files of other programs, are not compared.
    """
    place = folder.parent / file_of(RUN)
    if read_json(place).get("step") != RUN:
        return
    record = read(folder.parent, RUN)
    assert record is not None  # it is there
    others = tuple(name for name in record.outputs if not name.startswith(f"{folder.name}/"))
    if damage := record.damage(folder.parent, others):
        raise expect.InputError(
            f"{folder.parent}: {damage}; expected what the run recorded in {place}. Run the stage "
            "'finetune' again."
        )


def group_folder(of: Record | Step[Any]) -> Path:
    """Returns where results of the same settings are kept once others have replaced them."""
    number = of.number if isinstance(of, Record) else artefacts.result_number(of.kind)
    shared = {name: value for name, value in _key_of(of).items() if name != CELL}
    group = f"{of.kind}-{artefacts.json_hash([number, shared])[:12]}"
    return Path(SUPERSEDED) / group.replace(" ", "-")


def _key_of(of: Record | Step[Any]) -> dict[str, Any]:
    """Returns the key as a record holds it; numbers that JSON has no form of by their names."""
    return as_json(artefacts.finite(of.key, otherwise=str))


def _first_difference(
    found: Mapping[str, Any], expected: Mapping[str, Any], above: str = ""
) -> str | None:
    for name in dict.fromkeys([*expected, *found]):
        mine, theirs = expected.get(name, _MISSING), found.get(name, _MISSING)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            if inner := _first_difference(theirs, mine, f"{above}{name}."):
                return inner
        elif _text(mine) != _text(theirs):  # 1, 1.0 and true are equal in Python alone
            return f"made with {above}{name} {_short(theirs)}, expected {_short(mine)}"
    return None


def _text(value: Any) -> str:
    return "nothing" if value is _MISSING else json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    return expect.shortened(_text(value), 40)
