"""Sees to it that no process waits for one that died: all end, within a bounded time.

JAX's own heartbeats find the dead, and would abort the living with a stack trace. Here the living
learn who it was, and end with a code that a scheduler can act on; jaxlib before 0.9.2 calls
`_exit(1)` instead, which nobody can delay.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from dlc_jax import signals
from dlc_jax.distributed import processes

_EVERY_S = 1.0
_BEATS, _ENDS = "dlc_jax/beat", "dlc_jax/end"


@contextlib.contextmanager
def watched(is_one_of_several: bool) -> Iterator[None]:
    """Ends this process, in here, as soon as another one died or gave up.

    An exception ends all of them, with code 1; if another's death caused it, with
    `signals.RESTART`.

    Args:
      is_one_of_several: Else nothing is done. They need not have found each other yet.
    """
    if not is_one_of_several:
        yield
        return
    global _errors
    _errors = _FilteredErrors()
    watch = _Watch()
    try:
        yield
    except Exception as error:
        if processes.count() == 1:
            raise
        may_be_a_death = isinstance(error, jax.errors.JaxRuntimeError)
        if not may_be_a_death:
            traceback.print_exc()
        # a connection breaks at once; who died is known when JAX has missed its signs of life
        time.sleep(processes.heartbeat_s() + 10 * _EVERY_S)
        if may_be_a_death:
            traceback.print_exc()
        end(1, "failed with an exception; see what it printed")
    finally:
        watch.ended.set()
        _errors.restore()


def end(code: int, message: str) -> NoReturn:
    """Ends this process and, if there are others, those too, with the same code.

    Args:
      code: Exit code.
      message: What the others say of it.
    """
    if processes.count() > 1:
        said = json.dumps({"code": code, "message": message})
        with contextlib.suppress(Exception):  # the first process may be gone
            processes.client().key_value_set(f"{_ENDS}/{processes.index()}", said)
        _leave(code)
    _exit(code)


class _FilteredErrors:
    """What libraries write to stderr, without the stack that JAX prints when a process is dead."""

    _BEGINS = b"Terminating process because the JAX distributed service detected fatal errors"
    _HEAD, _FRAME = b"*** Check failure stack trace", re.compile(rb"\s+@ ")

    def __init__(self) -> None:
        """Starts to filter file descriptor 2; Python's own stderr bypasses it."""
        self._to = os.dup(2)
        sys.stderr.flush()
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        source, target = os.pipe()
        os.dup2(target, 2)
        os.close(target)
        self._thread = threading.Thread(target=self._hand_on, args=(source, self._to), daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """Stops filtering, after everything written so far was handed on."""
        os.dup2(self._to, 2)
        self._thread.join(_EVERY_S)

    def _hand_on(self, source: int, target: int) -> None:
        is_message = is_stack = False
        with os.fdopen(source, "rb") as lines:
            for line in lines:
                goes_on = is_stack and bool(self._FRAME.match(line))
                is_stack = goes_on or (is_message and self._HEAD in line)
                is_message = self._BEGINS in line or (is_message and not is_stack)
                if not is_message and not is_stack:
                    os.write(target, line)


_errors: _FilteredErrors | None = None  # none before `watched`


class _Watch:
    """Gives signs of life, and looks for those of the others, until it has `ended`.

    Two threads: where JAX has found a process dead, calls to the store may never return.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}  # of each process: the last one, and when
        _outlive_abort()
        for look in (self._meet, self._guard):
            threading.Thread(target=look, daemon=True).start()

    def _meet(self) -> None:
        """Meets the others at the store, again and again."""
        number = 0
        while not self.ended.wait(_EVERY_S):
            if processes.count() == 1:  # they have not found each other yet
                continue
            if not number:  # one that dies before its first sign of life is named, too
                met = time.monotonic()
                self._beats = {who: ("", met) for who in range(processes.count())}
            number += 1
            client, me = processes.client(), processes.index()
            try:
                client.key_value_set(f"{_BEATS}/{me}", str(number), allow_overwrite=True)
                beats = dict(client.key_value_dir_get(f"{_BEATS}/"))
                ends = dict(client.key_value_dir_get(f"{_ENDS}/"))
            except Exception:  # there is no store any more
                if not self.ended.is_set():
                    self._give_up()
                return
            for key, beat in beats.items():
                if self._beats.get(_process(key), ("", 0.0))[0] != beat:
                    self._beats[_process(key)] = (beat, time.monotonic())
            others = sorted(key for key in ends if _process(key) != me)
            if others and not self.ended.is_set():
                said = json.loads(ends[others[0]])
                _say(f"stopped: process {_process(others[0])} {said['message']}")
                _leave(said["code"])

    def _guard(self) -> None:
        """Ends this process before JAX does."""
        while not self.ended.wait(_EVERY_S):
            _outlive_abort()  # compilers bring handlers of their own
            if _is_aborting():
                self._give_up()

    def _give_up(self) -> None:
        """Prints who died, and ends this process."""
        mine = self._beats.get(processes.index(), ("", 0.0))[1]
        # JAX finds the dead some time between a third of its limit and the whole
        latest = mine - processes.heartbeat_s() / 3
        silent = sorted(who for who, (_, when) in self._beats.items() if when < latest)
        if not silent and not processes.answers(processes.coordinator()):
            silent = [0]  # it has the store
        names = ", ".join(f"process {who}" for who in silent)
        if not silent and not self._beats:  # it has met nobody yet
            names = "a process that this one did not know yet"
        if names:  # else it is this process that crashes
            _say(f"stopped: {names} died; the same command goes on where this one ended")
            _exit(signals.RESTART)


def _leave(code: int) -> NoReturn:
    """Ends this process so that the others have read why."""
    if processes.is_first():  # the store ends with it
        time.sleep(4 * _EVERY_S)
    _exit(code)


def _process(key: str) -> int:
    return int(key.rpartition("/")[2])


def _outlive_abort() -> None:
    """Gives the watch six seconds to say who died before JAX aborts this process.

    C's `sleep` becomes the handler of SIGABRT, and is called with its number, which is 6.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _is_aborting() -> bool:
    """Whether a thread is in the handler of SIGABRT, which is blocked there and nothing else."""
    abort, terminate = (1 << (number - 1) for number in (signal.SIGABRT, signal.SIGTERM))
    for path in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found = re.search(r"SigBlk:\s*([0-9a-f]+)", path.read_text())
            blocked = int(found[1], 16) if found else 0
            if blocked & abort and not blocked & terminate:
                return True
    return False


def _say(message: str) -> None:
    print(f"process {processes.index()}: {message}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Ends at once: an orderly end would wait for the others."""
    if _errors is not None:
        _errors.restore()
    signals.leave(code)
