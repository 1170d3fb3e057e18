"""Sees to it that no process waits for one that died: all end, within a bounded time.

JAX's own heartbeats find the dead, and would abort the living with a stack trace. Here the living
learn who it was, and end with a code that tells a scheduler what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from dlc_jax.distributed import processes
from dlc_jax.distributed.processes import RESTART

_EVERY_S = 1.0
_BEATS, _ENDS = "dlc_jax/beat", "dlc_jax/end"
_LATE_S = 5.0  # silent for longer than others when the store is lost


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process, in here, as soon as another one died or gave up."""
    if processes.count() == 1:
        yield
        return
    _outlive_abort()
    watch = _Watch()
    watch.start()
    try:
        yield
    finally:
        watch.ended.set()


def await_verdict() -> None:
    """Waits a little after an error that the death of another process may have caused.

    A collective operation fails as soon as a connection breaks; who died is known only when JAX has
    missed that process's signs of life.
    """
    time.sleep(processes.heartbeat_s() + 10 * _EVERY_S)


def end(code: int, message: str) -> NoReturn:
    """Ends this process and, if there are others, those too, with the same code.

    Args:
      code: Exit code.
      message: What the others say of it.
    """
    if processes.count() > 1:
        with contextlib.suppress(Exception):  # the first process may be gone
            processes.client().key_value_set(
                f"{_ENDS}/{processes.index()}", json.dumps({"code": code, "message": message})
            )
        _leave(code)
    sys.exit(code)


class _Watch:
    """Gives signs of life, and looks for those of the others.

    Two threads: where JAX has found a process dead it is about to abort this one, and calls to the
    store may never return.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}  # of each process: the last one, and when
        self._called = time.monotonic()  # the store, last

    def start(self) -> None:
        for look in (self._meet, self._guard):
            threading.Thread(target=look, daemon=True).start()

    def _meet(self) -> None:
        """Meets the others at the store, again and again."""
        client, me, number = processes.client(), processes.index(), 0
        while not self.ended.wait(_EVERY_S):
            number += 1
            self._called = time.monotonic()
            try:
                client.key_value_set(f"{_BEATS}/{me}", str(number), allow_overwrite=True)
                beats = dict(client.key_value_dir_get(f"{_BEATS}/"))
                ends = dict(client.key_value_dir_get(f"{_ENDS}/"))
            except Exception:  # there is no store any more
                if not self.ended.is_set():
                    _give_up(self._silent_for(_LATE_S) or [0])
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
        """Ends this process where the store does not answer and another one is silent.

        JAX finds the dead some time between a third of its limit and the whole, and the first
        process, which has the store, at once.
        """
        while not self.ended.wait(_EVERY_S):
            _outlive_abort()  # compilers bring handlers of their own
            if time.monotonic() - self._called < 3 * _EVERY_S:
                continue
            if silent := self._silent_for(processes.heartbeat_s() / 3):
                _give_up(silent)
            if not processes.answers(processes.coordinator()):
                _give_up([0])

    def _silent_for(self, seconds: float) -> list[int]:
        """Returns the processes that were silent so much longer than this one."""
        mine = self._beats.get(processes.index(), ("", 0.0))[1]
        return sorted(who for who, (_, when) in self._beats.items() if when < mine - seconds)


def _give_up(dead: list[int]) -> NoReturn:
    names = ", ".join(f"process {who}" for who in dead)
    _say(f"stopped: {names} died; the same command goes on where this one ended")
    _exit(RESTART)


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


def _say(message: str) -> None:
    print(f"process {processes.index()}: {message}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Ends at once: an orderly end would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
