"""SIGTERM and Ctrl-C, from the first line of a command to its last.

A command listens before it imports anything that takes time, so nothing of that kind is imported
here. Python runs handlers of signals in the main thread alone, and only between two of its
instructions, which a compilation can delay for minutes; what has to happen at once is therefore
done by a thread.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

RESTART = 75  # exit code (EX_TEMPFAIL) that asks a scheduler to start the same command again
_CODES = {signal.SIGTERM: RESTART, signal.SIGINT: 130}
_SAME_S = 0.1  # `timeout` and some launchers send one signal twice
# What the first signal does: end the process, raise `Stopped`, or wait until somebody asks.
_LEAVE, _RAISE, _DEFER = "leave", "raise", "defer"
_does = _LEAVE
_LOST = 0  # no signal
_asked = 0  # number of the first signal
_sockets: list[socket.socket] = []
_saying = threading.Lock()
_said: list[int] = []


class Stopped(BaseException):
    """The run was asked to stop. No `Exception`: nothing on the way should go on after it."""


def listen() -> None:
    """Takes SIGTERM and Ctrl-C from here on, unless whoever started this process ignores them.

    The first one prints "stopping" at once, and ends the process with code 75 or 130: at once, or
    in an orderly way within `raised`. A second one ends it at once. Both are ignored once the
    interpreter shuts down, so that a command that is done ends with its own code.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _sockets[:] = [ours, theirs]
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_attend, args=(ours,), daemon=True).start()
    for number in _CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    sys.unraisablehook = _raise_again
    atexit.register(_ignore)  # the first one registered is called last


def asked() -> int:
    """Returns the number of the signal that asked the run to stop; 0: none did."""
    return _asked


def note(number: int) -> None:
    """Notes that another process of the run was asked to stop, by this signal."""
    global _asked
    _asked = _asked or number


def code() -> int:
    """Returns the exit code of a run that was asked to stop."""
    return _CODES.get(signal.Signals(_asked), RESTART) if _asked else RESTART


def poll() -> None:
    """Raises `Stopped` if the run was asked to stop, and nothing puts that off.

    Loops call it at every step: a library may have caught what was raised first.
    """
    if _asked and _does == _RAISE:
        raise Stopped


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Has the first signal raise `Stopped` in here, for an orderly end.

    Raises:
      Stopped: also where a library made another exception of it, or caught it.
    """
    global _does
    _does = _RAISE
    try:
        yield
        poll()
    except Exception as error:
        if _asked:
            raise Stopped from error
        raise
    finally:
        _does = _DEFER if _asked else _LEAVE  # the orderly end has begun


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Puts `Stopped` off to the end of the block, which may ask `asked` and end earlier."""
    global _does
    before, _does = _does, _DEFER
    try:
        yield
    finally:
        _does = before
    poll()


def is_deferred() -> bool:
    """Whether `Stopped` is put off."""
    return _does == _DEFER


def leave(code: int) -> NoReturn:
    """Ends the process without Python's own end, which crashes where XLA still compiles."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked:
        return  # the thread attends to a second one
    _asked = number
    _say()
    if _does == _LEAVE:
        os._exit(code())
    if _does == _RAISE:
        raise Stopped


def _ignore() -> None:
    """Ignores signals: while Python shuts down the system's handlers would kill the process."""
    for number in _CODES:
        signal.signal(number, signal.SIG_IGN)


def _attend(signals: socket.socket) -> None:
    """Prints that the run is stopping, and ends the process where that is to happen at once."""
    first, since = 0, 0.0
    while received := signals.recv(64):
        for number in received:
            if number == _LOST and _does == _RAISE:
                time.sleep(_SAME_S)  # within `_raise_again` it would be dropped for good
                main = ctypes.c_ulong(threading.main_thread().ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Stopped))
            if number not in _CODES:
                continue
            if not first:
                first, since = number, time.monotonic()
                _say()
                if _does == _LEAVE:
                    os._exit(_CODES[signal.Signals(number)])
            elif time.monotonic() - since > _SAME_S:
                os._exit(_CODES[signal.Signals(first)])


def _say() -> None:
    """Prints once that the run is stopping; not through sys.stderr, which may be in use."""
    with _saying, contextlib.suppress(OSError):
        if not _said:
            _said.append(os.write(2, b"stopping; a second signal ends at once\n"))


def _raise_again(lost: Any) -> None:
    """Has `Stopped` raised once more where Python dropped it, as in a callback of its collector."""
    if isinstance(lost.exc_value, Stopped):
        _sockets[1].send(bytes([_LOST]))  # raised in here it would be dropped again
    else:
        sys.__unraisablehook__(lost)
