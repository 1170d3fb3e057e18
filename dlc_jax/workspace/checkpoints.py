"""Checkpoints of a run, written while training goes on, the last good one kept."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from dlc_jax import expect
from dlc_jax.distributed import processes
from dlc_jax.workspace import artefacts

_STATE, _HISTORY, _CHECKSUMS = "state", "history.json", "checksums.json"
History: TypeAlias = list[dict[str, Any]]  # what led to a state


class Checkpoints:
    """The folder `checkpoint/` of a run; a context that ends with the last one on disk.

    A checkpoint is a folder named by its number: `state/` as Orbax writes it, `history.json`, and
    `checksums.json` with the SHA-256 of every other file, and of those that the run keeps beside
    its checkpoints. Only a checkpoint that agrees with its checksums is restored.

    Args:
      folder: Made if need be.
      inputs: Hash of what decides the run; a checkpoint of other inputs is not restored.
      beside: A folder of files that belong to the run's state and that it only ever adds to.
      say: Takes a line for each checkpoint that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        inputs: str,
        beside: Path | None = None,
        say: Callable[[str], None] = print,
    ):
        self._folder, self._inputs, self._beside, self._say = folder, inputs, beside, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        with self._clear_errors("open"):
            folder.mkdir(parents=True, exist_ok=True)
            artefacts.clear_leftovers(folder, everyones=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:  # else the first error is the one to tell
                self.wait()
        finally:
            self._thread.shutdown()

    def save(self, number: int, state: Any, history: History) -> None:
        """Starts writing a state, a pytree of arrays; earlier ones go once it is whole."""
        self.wait()
        if processes.count() > 1:  # every process has all of it
            state = jax.tree.map(np.asarray, state)
        beside = artefacts.names_below(self._beside)  # before more is added
        self._written = self._thread.submit(self._write, number, state, history, beside)

    def restore(self, like: Any) -> tuple[Any, History] | None:
        """Returns the last good state and what led to it; None if there is none.

        Args:
          like: Arrays of the same structure, shapes and types, that lie where it goes.
        """
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        with self._clear_errors("read"):
            for number in sorted(self._numbers(), reverse=True):
                path = self._folder / str(number)
                damage = self._damage(path)
                if damage is None:
                    history = artefacts.read_json(path / _HISTORY)["epochs"]
                    with _orbax() as (orbax, args):
                        found = args.StandardRestore(shapes)
                        return orbax.restore((path / _STATE).resolve(), args=found), history
                self._say(f"note: {path}: damaged, not used: {damage}")
        return None

    def wait(self) -> None:
        """Returns when everything is on disk."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _write(self, number: int, state: Any, history: History, beside: list[str]) -> None:
        with _quiet():
            failure = self._failure(number, state, history, beside)
            if failure is not None:
                gc.collect()  # what was under way, while nobody hears it complain
                for _ in range(10):  # other writes under way may still add to what was left
                    artefacts.clear_leftovers(self._folder, everyones=True)
                    time.sleep(0.1)
        if failure is not None:
            raise expect.InputError(f"{failure}. {self._after_failure()}")
        for other in self._numbers() - {number}:
            artefacts.remove(self._folder / str(other))

    def _failure(self, number: int, state: Any, history: History, beside: list[str]) -> str | None:
        """Writes a checkpoint; returns why that failed, without the error, which holds a lot."""
        try:
            with artefacts.atomic_folder(self._folder / str(number)) as place:
                with _orbax() as (orbax, args):
                    orbax.save((place / _STATE).resolve(), args=args.StandardSave(state))
                artefacts.write_json(place / _HISTORY, {"epochs": history})
                written = {
                    "inputs": self._inputs,
                    "number": number,
                    "files": artefacts.hashes_below(place),
                    "beside": artefacts.hashes_below(self._beside, beside),
                }
                artefacts.write_json(place / _CHECKSUMS, written)
        except Exception as error:  # Orbax and TensorStore raise anything from OSError on
            return f"{self._folder}: cannot write a checkpoint: {_reason(error)}"
        return None

    def _after_failure(self) -> str:
        whole = [n for n in self._numbers() if self._damage(self._folder / str(n)) is None]
        if not whole:
            return "There is none yet; the same command starts this run again."
        return f"The last whole one, {max(whole)}, is untouched; the same command goes on from it."

    def _numbers(self) -> set[int]:
        """Returns those of the checkpoints on disk."""
        names = [path.name for path in self._folder.glob("*")]
        return {int(name) for name in names if re.fullmatch("0|[1-9][0-9]{,17}", name)}

    def _damage(self, path: Path) -> str | None:
        """Returns how a checkpoint differs from what was written; None if it does not."""
        try:
            written = artefacts.read_json(path / _CHECKSUMS)
            number, inputs = written["number"], written["inputs"]
            files, beside = dict(written["files"]), dict(written["beside"])
        except (KeyError, TypeError, ValueError):
            return f"{_CHECKSUMS} is missing or cannot be read."
        if (str(number), inputs) != (path.name, self._inputs):
            return f"it is checkpoint {number} of a run with inputs {str(inputs)[:12]}."
        found = artefacts.hashes_below(path)
        del found[_CHECKSUMS]
        # more is beside it if the run ended before the next checkpoint
        found_beside = artefacts.hashes_below(self._beside, beside)
        return artefacts.difference(files, found) or artefacts.difference(beside, found_beside)

    def _clear_errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        problem = f"{self._folder}: cannot {what} a checkpoint"
        end = ". Delete the folder to start this run again."
        return expect.refusing(problem, Exception, shown=_reason, end=end)


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """Gives Orbax's checkpointer, which works in this process alone, and the kinds of arguments."""
    import orbax.checkpoint as ocp  # half a second, which only fine-tuning to disk needs

    # one process keeps all of it, and the others do not know: Orbax should not wait for them
    alone = ocp.options.MultiprocessingOptions(
        primary_host=processes.index(),
        active_processes={processes.index()},
        barrier_sync_key_prefix=f"alone_{processes.index()}",
    )
    options = {"multiprocessing_options": alone} if processes.count() > 1 else {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as orbax:
        yield orbax, ocp.args


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libraries from printing tracebacks, of which one write that fails has dozens.

    Orbax and asyncio log them; TensorStore prints one for each other write that is under way.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def without_writes(found: sys.UnraisableHookArgs) -> None:
        if str(found.exc_value) != "Event loop is closed":
            hook(found)

    try:
        sys.unraisablehook = without_writes
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """Returns the system's reason, which TensorStore hides in a page of paths and settings."""
    if isinstance(error, expect.InputError):
        return str(error).rstrip(".")
    said = re.search(r": ([^:\[\]]+) \[(?:tensorstore_spec|os_error_code)=", str(error))
    return said[1] if said else expect.first_line(error)[:300]
