"""A work directory: results are made once, by one run at a time, and read by what comes later.

Names and formats in it are in `artefacts`, what was made in `records`, its copy in a bucket in
`bucket`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple

from dlc_jax import expect
from dlc_jax.distributed import processes
from dlc_jax.workspace import artefacts, lease, records
from dlc_jax.workspace.records import FolderStep, Record, Step, Value, Written

_LAYOUT = 2  # of a work directory; 0.1 had none
_RUN_FOLDERS = (f"{artefacts.FINETUNE}/*/*", artefacts.TRAINING)  # folders that are moved whole
_PROVENANCE = {"layout?": int, "versions?": {"dlc_jax?": re.compile(r"[\w.+-]{1,40}")}}


@dataclasses.dataclass(frozen=True)
class Made(Generic[Value]):
    """What a step computed, apart from what it left on disk."""

    value: Value


class Workspace(NamedTuple):
    """A work directory, shared by all processes of a run; only the first one writes there.

    Attributes:
      root: The folder.
      say: Takes each line meant for the user.
    """

    root: Path
    say: Callable[[str], None] = expect.show

    @classmethod
    def of(cls, root: Path, say: Callable[[str], None]) -> Workspace:
        """Returns a work directory of whose processes the first alone prints."""
        return cls(root, say if processes.is_first() else lambda line: None)

    @contextlib.contextmanager
    def held(self, option: str = "--workdir") -> Iterator[None]:
        """Makes the folder if need be, and keeps other runs out of it.

        Args:
          option: Name of the option that gave the folder, for messages.
        Raises:
          ValueError: another run is at work there, it cannot be written to, or an earlier version
            made it.
        """
        with contextlib.ExitStack() as stack:
            if not artefacts.is_mirrored(self.root):  # a bucket is only known once it is held
                processes.on_first(self._check_layout)  # nothing is changed where it is another
            processes.on_first(lambda: self._enter(stack, option))
            yield

    @property
    def _place(self) -> lease.LeasePlace:
        """Where the lease is: of the work directory that the folder is in, if it is in one."""
        above = self.root.resolve().parents
        whole = (path for path in above if (path / artefacts.PROVENANCE).is_file())
        return lease.place_of(next((p for p in whole if (p / records.FOLDER).is_dir()), self.root))

    def ensure(self, step: Step[Value]) -> Made[Value] | None:
        """Makes a result unless a valid one is there, in which case it returns None.

        All processes call this.

        Raises:
          ValueError: whatever the step raises; a record that is damaged.
        """
        if not processes.value_of_first(lambda: self._is_there_or_restored(step)):
            return Made(self.make(step))
        if records.is_run(step):  # a kill may have come between record and deletion
            processes.on_first(lambda: self._delete(step.obsolete))
        return None

    def make(self, step: Step[Value]) -> Value:
        """Makes a result, there or not, in all processes; returns what the step computed.

        Raises:
          ValueError: whatever the step raises; a folder that holds another run.
        """
        start, facts = time.perf_counter(), {}
        if records.is_run(step):
            facts = processes.on_first(lambda: self._claim(step)) or {}
            value = step.compute(self.root if processes.is_first() else None)
        else:
            value = step.compute(self.root / artefacts.UNFINISHED)
        processes.wait_for_all()  # the first removes what the others read until here

        def commit() -> None:
            if not records.is_run(step):
                self._set_other_aside(step)
            written = step.write(self.root, value)
            written = written._replace(facts={**facts, **written.facts})
            self._put(Record.of(self.root, step, written, time.perf_counter() - start))
            self._delete(step.obsolete)

        processes.on_first(commit)
        return value

    def has(self, step: Step[Any]) -> bool:
        """Whether a result is there, made from this key, with its files as they were written."""
        return records.reason_to_make(self.root, step) is None

    def alone(self, compute: Callable[[], Value]) -> Value | None:
        """Computes in the first process, which has the work directory; None in the others.

        Raises:
          ValueError: in all processes, if it or OSError is raised in the first.
        """
        return processes.on_first(compute)

    def broadcast(self, compute: Callable[[], Value]) -> Value:
        """Computes as `alone` does, and returns the value, which JSON can hold, in all."""
        return processes.value_of_first(compute)

    def check(self, step: Step[Any]) -> None:
        """Raises unless a result is there that was made from this key.

        Raises:
          ValueError: it is not there, was made from something else, or its files have changed.
        """
        if reason := records.reason_to_make(self.root, step):
            raise expect.InputError(f"{reason}. Run the stage {step.stage!r} again.")

    def set_aside(self, record: Record) -> None:
        """Moves a result to `superseded/`, from where `ensure` takes it back."""
        folder = self.root / records.group_folder(record)
        _move([*record.outputs, records.file_of(record.step)], self.root, folder)

    def _set_other_aside(self, step: Step[Any]) -> None:
        """Sets aside the result of another key that is where this one goes."""
        there = records.read(self.root, step.name)
        is_other = there is not None and there.step == step.name and there.difference(step)
        if there is not None and is_other and step.kind not in artefacts.DERIVED:
            self.set_aside(there)

    def remove(self, name: str) -> None:
        """Deletes a file or folder, in the first process; the others do not wait for it."""
        if processes.is_first():
            artefacts.remove(self.root / name)

    def set_run_aside(self, name: str, group: str) -> None:
        """Moves a folder to `superseded/`; an older one of its name and group makes place."""
        target = self.root / records.SUPERSEDED / group / name
        artefacts.remove(target)
        artefacts.move(self.root / name, target)

    def take_runs_back(self, pattern: str, group: str) -> None:
        """Moves folders of a group back, such as `finetune/*/*`, to where none are."""
        aside = self.root / records.SUPERSEDED / group
        for path in sorted(aside.glob(pattern)):
            target = self.root / path.relative_to(aside)
            if not target.exists():
                artefacts.move(path, target)

    def write_text(self, name: str, text: str) -> bool:
        """Writes a file in the first process; returns whether this one did."""
        if processes.is_first():
            with artefacts.atomic(self.root / name, "w") as file:
                file.write(text)
        return processes.is_first()

    def note(
        self,
        stage: str,
        settings: Mapping[str, Any],
        seconds: float,
        facts: Mapping[str, Any] = {},
    ) -> None:
        """Records how a stage ran whose results have records elsewhere, unless that is known."""

        def put() -> None:
            known = records.as_json(settings), round(seconds, 3), records.as_json(facts)
            there = records.read(self.root, stage)
            if there is None or (there.settings, there.seconds, there.facts) != known:
                # it has no key and no files of its own
                self._put(Record(stage, "stage", 0, {}, known[0], {}, known[1], facts=known[2]))

        processes.on_first(put)

    def _enter(self, stack: contextlib.ExitStack, option: str) -> None:
        stack.enter_context(lease.held(self._place, self.say, option))
        artefacts.prepare_workdir(self.root, option)
        self._check_layout()
        if artefacts.is_mirrored(self.root):
            self._end_moves()

    def _end_moves(self) -> None:
        """Deletes what interrupted moves of runs left behind: a bucket moves a folder by files.

        A move that was interrupted between its two parts leaves the run in both places.
        """
        for pattern in _RUN_FOLDERS:
            for aside in sorted(self.root.glob(f"{records.SUPERSEDED}/*/{pattern}")):
                here = self.root.joinpath(*aside.relative_to(self.root).parts[2:])
                if not _holds_run(aside):
                    artefacts.remove(aside)
                elif here.exists() and not _holds_run(here):
                    artefacts.remove(here)

    def _check_layout(self) -> None:
        found = artefacts.read_json(self.root / artefacts.PROVENANCE, _PROVENANCE)
        if found and found.get("layout") != _LAYOUT:
            theirs = found.get("versions", {}).get("dlc_jax", "0.1")
            raise expect.InputError(
                f"{self.root}: was made by dlc_jax {theirs}, whose work directories have another "
                f"layout; expected a new --workdir, or dlc_jax {theirs} to continue this one."
            )

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            artefacts.remove(self.root / name)

    def _claim(self, step: FolderStep[Any]) -> dict[str, Any]:
        """Records what the folder is of, before there is a result; returns the facts of that."""
        there = records.read(self.root, step.name)
        if there is not None and (difference := there.difference(step)):
            raise expect.InputError(
                f"{self.root}: holds a run with other data, encoder, kept samples or settings "
                f"({difference}); expected an empty folder, or the one of the same run."
            )
        facts = {**({} if there is None else there.facts), **step.facts}
        facts.pop(records.RESULT, None)
        Record.of(self.root, step, Written((), facts)).write(self.root)
        return facts

    def _is_there_or_restored(self, step: Step[Any]) -> bool:
        """Whether the result is there; one that was set aside is restored first.

        While files are moved, the record is in the work directory and not in `superseded/`, so that
        the next call brings the result together again, in one place or the other.
        """
        there = records.read(self.root, step.name)
        if not records.is_run(step):
            folder = self.root / records.group_folder(step)
            is_this = there is not None and there.difference(step) is None
            wanted = there if is_this else records.read(folder, step.name)
            if wanted is not None and wanted.difference(step) is None:
                self._set_other_aside(step)
                _move([records.file_of(step.name), *wanted.outputs], folder, self.root)
                if not is_this and "/" not in step.name:
                    self._show()
        reason = records.reason_to_make(self.root, step)
        if reason and there is not None and there.outputs and not there.difference(step):
            self.say(f"note: {reason}; it is made again")
        return reason is None

    def _put(self, record: Record) -> None:
        """Writes a record and, unless more of its stage are to come, `provenance.json`."""
        record.write(self.root)
        if "/" not in record.step and record.step != records.RUN:
            self._show()

    def _show(self) -> None:
        """Writes `provenance.json`, a view of the records, unless it is up to date."""
        found = records.matching(self.root, "*")
        newest = max(found, key=self._written_at)
        view: dict[str, Any] = {}
        for record in found:
            view |= record.facts
        view |= {"layout": _LAYOUT, "versions": newest.versions, "devices": newest.devices}
        shown = ("key", "settings", "seconds", "versions", "devices", "outputs")
        view["stages"] = {
            record.step: {name: getattr(record, name) for name in shown} for record in found
        }
        path = self.root / artefacts.PROVENANCE
        if artefacts.read_json(path) != view:
            artefacts.write_json(path, view)

    def _written_at(self, record: Record) -> int:
        return (self.root / records.file_of(record.step)).stat().st_mtime_ns


def _holds_run(folder: Path) -> bool:
    return (folder / records.file_of(records.RUN)).is_file()


def _move(names: list[str], source: Path, target: Path) -> None:
    """Moves files that are there, in this order; a move that was stopped can be repeated."""
    for name in names:
        if (source / name).exists():
            artefacts.move(source / name, target / name)
