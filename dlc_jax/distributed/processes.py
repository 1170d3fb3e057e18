"""The processes of a run: how they find each other, share what one has, and stop together.

Without `start` there is one process, and everything here does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# JAX offers no public way to the store that its processes share
from jax._src.distributed import global_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlc_jax import expect, signals

_PREFIX = "dlc_jax"
_POLL_MS = 1000  # a signal's Python handler runs between two polls
_LATER_S = 60  # JAX gives up so much later than we do: it would print a stack trace
_SLURM_PORTS = range(20_000, 50_000)
_numbers = itertools.count()  # of messages; all processes pass the same ones in the same order
_heartbeat_s = 0
_place: Place | None = None  # of this process, from the start of `start` on
_is_alone = False  # whether the first process computes what no other takes part in
_have_met = False  # JAX sets its client before it has connected, when it must not be used yet
Value = TypeVar("Value")


class Place(NamedTuple):
    """Where a process stands.

    Attributes:
      coordinator: host:port of the first process.
      num_processes: How many there are.
      process_id: Which this one is, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


class NotAllCame(Exception):
    """The processes of a run did not find each other in time; trying again may help."""


class SaidByFirst(expect.SharedError):
    """What went wrong in the first process, which prints it."""


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Returns this process's place, of what is given, the environment or Slurm; None: it is alone.

    Args:
      coordinator, num_processes, process_id: See `Place`; None: JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, or those of the Slurm step.
    Raises:
      ValueError: some are missing, or do not fit together.
    """
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("JAX_NUM_PROCESSES", num_processes)
    process_id = _number("JAX_PROCESS_ID", process_id)
    if address is None and num_processes is None and process_id is None:
        return _place_in_slurm()
    if num_processes == 1:
        return None
    if address is None or num_processes is None or process_id is None:
        given = {"coordinator_address": address, "num_processes": num_processes}
        missing = next((name for name, value in given.items() if value is None), "process_id")
        raise expect.InputError(
            f"--{missing}: missing; expected coordinator_address, num_processes and process_id "
            "together, as options or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID."
        )
    _check_address(address)
    expect.at_least("--num_processes", num_processes, 1)
    if not 0 <= process_id < num_processes:
        raise expect.InputError(
            f"--process_id: expected 0 to {num_processes - 1}, got {process_id}."
        )
    return Place(address, num_processes, process_id)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        is_host = bool(host.encode("idna"))  # as looking it up does
    except UnicodeError:
        is_host = False
    if not is_host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise expect.InputError(
            f"--coordinator_address: expected host:port, with a port from 1 to 65535, got "
            f"{address!r}."
        )


def _number(name: str, given: int | None = None) -> int | None:
    text = os.environ.get(name)
    if given is not None or not text:
        return given
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise expect.InputError(f"{name}: expected a number, got {text!r}.")
    return int(text)


def _place_in_slurm() -> Place | None:
    """Returns the task's place in a step of several tasks, as started by `srun`; None: one task."""
    num_tasks = _number("SLURM_STEP_NUM_TASKS")
    if num_tasks is None or num_tasks <= 1:
        return None
    number, job = _number("SLURM_PROCID"), _number("SLURM_JOB_ID")
    nodes = os.environ.get("SLURM_STEP_NODELIST", "").strip()  # such as a[07-09,12],b3
    first = re.match(r"([^,\[\]]+)(?:\[([^,\-\[\]]+)[^\[\]]*\])?(?:,|$)", nodes)
    if number is None or job is None:
        found = f"{'SLURM_PROCID' if number is None else 'SLURM_JOB_ID'} is not set"
    elif number >= num_tasks:
        found = f"SLURM_PROCID is {number} of SLURM_STEP_NUM_TASKS {num_tasks}"
    elif first is None:
        found = f"SLURM_STEP_NODELIST is {nodes!r}"
    else:
        port = _SLURM_PORTS[job % len(_SLURM_PORTS)]
        return Place(f"{first[1]}{first[2] or ''}:{port}", num_tasks, number)
    raise expect.InputError(
        f"Slurm: {found}, in a step of several tasks; expected all that srun sets, or "
        "SLURM_STEP_NUM_TASKS unset for a run of one process."
    )


def start(place: Place, *, heartbeat_s: int, timeout_s: int = 300) -> None:
    """Joins the others; has to come before anything is computed.

    Args:
      place: Number of this process, and where to find the others.
      heartbeat_s: Seconds without a sign of life after which a process counts as dead.
      timeout_s: Seconds to wait for all to come.
    Raises:
      NotAllCame: not all did.
    """
    global _heartbeat_s, _place, _have_met
    _heartbeat_s, _place = heartbeat_s, place
    # SIGTERM is ours: see `stopping`. JAX has an option for that, but 0.8.0 does not know it
    state: Any = global_state
    state.initialize_preemption_sync_manager = lambda: None
    try:
        _find_first(place, timeout_s)
        _meet(place, heartbeat_s, timeout_s)
        _have_met = True
    finally:
        if not _have_met:
            _place = None


def _find_first(place: Place, timeout_s: int) -> None:
    """Waits until the first process answers: JAX aborts the process where it finds nobody there."""
    deadline = time.monotonic() + timeout_s
    while place.process_id and not answers(place.coordinator):
        if time.monotonic() > deadline:
            raise NotAllCame(
                f"process {place.process_id} of {place.num_processes}: nobody answered at "
                f"{place.coordinator} for {timeout_s} s, where process 0 should be."
            )
        time.sleep(0.2)


def _meet(place: Place, heartbeat_s: int, timeout_s: int) -> None:
    """Connects all processes, in a thread: a signal would have to wait for the others."""
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.num_processes,
                place.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout_s + _LATER_S,
                heartbeat_timeout_seconds=heartbeat_s,
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    answered = began = time.monotonic()
    while not failed and thread.is_alive() and time.monotonic() < began + timeout_s:
        thread.join(_POLL_MS / 1000)
        if not place.process_id or answers(place.coordinator):
            answered = time.monotonic()
        elif time.monotonic() > answered + heartbeat_s:
            break
    if not failed and not thread.is_alive():
        return
    why = f" within {timeout_s} s"
    if failed:
        why = f": {expect.first_line(failed[0])}"
    elif time.monotonic() > answered + _POLL_MS / 1000:
        why = ": process 0 died, or gave up"
    raise NotAllCame(
        f"process {place.process_id} of {place.num_processes}: not all came together at "
        f"{place.coordinator}{why}"
    )


def heartbeat_s() -> int:
    """Returns after how many seconds without a sign of life a process counts as dead."""
    return _heartbeat_s


def answers(address: str) -> bool:
    """Whether anybody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def index() -> int:
    """Returns which process this is, from 0; also while the others are awaited."""
    return _place.process_id if _place is not None else 0


def count() -> int:
    """Returns how many processes there are; 1 until they have met."""
    return _place.num_processes if _place is not None and _have_met else 1


def coordinator() -> str:
    """Returns host:port of the first process's store, also before all have found each other."""
    return _place.coordinator if _place is not None else ""


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return index() == 0


def on_first(compute: Callable[[], Value]) -> Value | None:
    """Computes in the first process alone, while the others wait; they get None.

    Raises:
      ValueError: in all processes, if it or OSError is raised in the first.
    """
    found: list[Value] = []
    value_of_first(lambda: found.append(compute()))
    return found[0] if found else None


def value_of_first(compute: Callable[[], Value]) -> Value:
    """Computes in the first process alone, and returns the value in all.

    Args:
      compute: Gives what JSON can hold; lists, not tuples.
    Raises:
      ValueError: in all processes, if it or OSError is raised in the first.
    """
    global _is_alone
    if _is_alone or count() == 1:
        return compute()
    key = f"{_PREFIX}/said/{next(_numbers)}"
    if not is_first():
        message = json.loads(_waited_for(key))
        if "error" in message:
            raise SaidByFirst(message["error"])
        return message["value"]
    _is_alone = True
    try:
        value = compute()
    except (expect.InputError, OSError) as error:
        client().key_value_set(key, json.dumps({"error": str(error)}))
        raise expect.SharedError(str(error)) from error
    finally:
        _is_alone = False
    client().key_value_set(key, json.dumps({"value": value}))
    return value


def refuse(message: str) -> NoReturn:
    """Raises ValueError in all processes, which have found the same; the first one's is shown."""
    raise expect.SharedError(message) if is_first() else SaidByFirst(message)


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    everyones(None)


def everyones(value: Any) -> list[Any]:
    """Returns what each process passes, by process; all wait for all.

    Args:
      value: What JSON can hold.
    """
    if _is_alone or count() == 1:
        return [value]
    folder = f"{_PREFIX}/all/{next(_numbers)}"
    client().key_value_set(f"{folder}/{index()}", json.dumps(value))
    return [json.loads(_waited_for(f"{folder}/{number}")) for number in range(count())]


def share(items: Sequence[Value], number: int) -> Sequence[Value]:
    """Returns the items that a process has to do: consecutive, as many as the others have.

    Args:
      items: What to divide, the same in all processes.
      number: Which process; numbers past the last one start again at the first.
    """
    bounds = [len(items) * place // count() for place in range(count() + 1)]
    return items[bounds[number % count()] : bounds[number % count() + 1]]


def client() -> Any:
    """Returns JAX's way to the store that processes share."""
    return global_state.client


def _waited_for(key: str) -> str:
    """Returns a value of the store as soon as it is there, however long that takes.

    That processes which die meanwhile do not make this wait for ever is the watch's business.
    """
    while True:
        try:
            return client().blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


_STEPS_LATE = 2  # so that no step waits for the answer of the one before
_most = jax.jit(jnp.max)
_pending: collections.deque[jax.Array] = collections.deque()  # answers that nobody waits for yet


def stop_if_asked() -> None:
    """Raises `Stopped` if the run was asked to stop while that was put off."""
    if number := value_of_first(signals.asked):
        signals.note(number)
        raise signals.Stopped


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """Puts `Stopped` off, in here: a loop asks `is_due` after every step, saves, and raises it."""
    _pending.clear()
    with signals.deferred():
        yield


def is_due() -> bool:
    """Whether to stop after this step, within `at_steps`.

    All processes have to ask at the same steps, and get the same answer if any was asked to stop.
    """
    if not signals.is_deferred() or count() == 1:
        return signals.is_deferred() and signals.asked() > 0
    _pending.append(_largest(signals.asked()))
    if len(_pending) <= _STEPS_LATE:
        return False
    number = int(_pending.popleft())
    signals.note(number)
    return number > 0


def stop_together() -> NoReturn:
    """Raises `Stopped` once all processes have come here.

    The end of one would end another that still writes what it leaves.
    """
    wait_for_all()
    raise signals.Stopped


def _largest(value: int) -> jax.Array:
    """Returns the largest value of all processes, without waiting for it."""
    mesh = Mesh(np.array(jax.devices()), "all")
    here = np.full(1, value, np.int32)
    spread = NamedSharding(mesh, PartitionSpec("all"))
    return _most(jax.make_array_from_callback((mesh.size,), spread, lambda _: here))
