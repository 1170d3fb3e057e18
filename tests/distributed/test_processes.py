"""Real processes over loopback: what they find is what one finds, whoever dies on the way."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jaxlib.version
import numpy as np
import pytest
from conftest import ROOT

import dlc_jax as dlc
from dlc_jax import signals
from dlc_jax.distributed import processes

SCORE = [
    "--config=configs/demo.py",
    "--config.encoder.image_size=32",
    "--config.probe.batch_size=8",
    "--config.probe.num_probes=4",
    "--config.selection.splits=0.5,",
    "--heartbeat_s=10",
]
SELECT = [
    "--config.selection.methods=flexrand,herding",  # herding goes by features
    "--config.selection.keep_fractions=0.3,0.6",
]
SWEEP = [
    "--config.stages=score,select,finetune",
    "--config.selection.methods=flexrand",
    "--config.selection.keep_fractions=0.5,",
    "--config.selection.seeds=1,",
    "--config.finetune.epochs=3",
    "--config.finetune.batch_size=9",
    "--config.finetune.learning_rate=0.01",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """Arguments for 61 samples, and for three."""
    sample = dlc.load_dataset("demo:caltech15/train")
    found = {}
    for name, positions in (("odd", range(0, 732, 12)), ("few", (0, 1, 70))):
        root = tmp_path_factory.mktemp(name)
        for position in positions:
            path = root / str(sample.ids[position])
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(sample[position].image)
        found[name] = [f"--config.dataset.train=folder:{root}"]
    found["odd"].append("--config.dataset.test=" + found["odd"][0].partition("=")[2])
    return found


def start(
    num: int,
    workdir: Path,
    arguments: list[str],
    num_devices: int = 1,
    late: tuple[int, float] = (0, 0.0),
    homes: Sequence[Path] = (),
):
    """Starts processes that find each other.

    Args:
      late: Which one starts how many seconds later.
      homes: Home folder of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {}
    for number in sorted(range(num), key=lambda number: number == late[0]):
        time.sleep(late[1] if number == late[0] else 0)
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(num),
            "JAX_PROCESS_ID": str(number),
        }
        if homes:
            env["HOME"] = str(homes[number])
        command = [sys.executable, "-m", "dlc_jax.main", f"--workdir={workdir}", *arguments]
        pipe = subprocess.PIPE
        started[number] = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
        )
    return [started[number] for number in range(num)]


def ended(started) -> tuple[list[int], list[str]]:
    """Returns exit codes, and what was written to stderr."""
    said = [process.communicate(timeout=240)[1] for process in started]
    return [process.returncode for process in started], said


def run(num: int, workdir: Path, arguments: list[str], num_devices: int = 1) -> None:
    codes, said = ended(start(num, workdir, arguments, num_devices))
    assert codes == [0] * num, "\n".join(text[-2000:] for text in said)


def check_same(workdir: Path, expected: Path) -> None:
    """Everything that scoring and selection leave is bit for bit the same."""
    for name in ("losses", "features"):
        if not (expected / f"scores/{name}.npz").exists():
            continue
        with (
            np.load(workdir / f"scores/{name}.npz") as a,
            np.load(expected / f"scores/{name}.npz") as b,
        ):
            assert set(a.files) == set(b.files)
            for key in a.files:
                np.testing.assert_array_equal(a[key], b[key])
    kept = sorted(path.relative_to(expected) for path in expected.glob("selections/**/*.npy"))
    assert kept
    for path in kept:
        np.testing.assert_array_equal(np.load(workdir / path), np.load(expected / path))
    assert not list(workdir.glob("unfinished/*"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict[str, Path]:
    """What one process finds."""
    found = {}
    for name, where in data.items():
        found[name] = tmp_path_factory.mktemp("alone") / name
        run(1, found[name], [*SCORE, *SELECT, *where])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "num_devices", "name"),
    [
        (4, 1, "odd"),
        (4, 1, "few"),
        (2, 2, "odd"),
    ],
)
def test_several_processes_find_what_one_finds(data, alone, tmp_path, num, num_devices, name):
    run(num, tmp_path, [*SCORE, *SELECT, *data[name]], num_devices)
    check_same(tmp_path, alone[name])


@pytest.mark.parametrize(
    ("rank", "seconds"),
    [
        pytest.param(0, 30, marks=pytest.mark.long),
        pytest.param(1, 5, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_starts_later_is_waited_for(data, alone, tmp_path, rank, seconds):
    codes, said = ended(start(2, tmp_path, [*SCORE, *SELECT, *data["few"]], 1, (rank, seconds)))
    assert codes == [0, 0], "\n".join(text[-2000:] for text in said)
    check_same(tmp_path, alone["few"])


names_the_dead = pytest.mark.skipif(
    jaxlib.version.__version_info__ < (0, 9, 2),
    reason="before 0.9.2, jaxlib calls _exit(1) before anybody can say who died",
)
JOIN = """
import sys, time
import jax
from dlc_jax.distributed import processes, watch

coordinator, num, number, breaks = sys.argv[1], *map(int, sys.argv[2:])
with watch.watched(True):
    print("starts", flush=True)
    try:
        processes.start(processes.Place(coordinator, num, number), heartbeat_s=10, timeout_s=200)
        print("is there", flush=True)
        if breaks and number:  # as a call does that is under way when the first process dies
            while processes.answers(coordinator):
                time.sleep(0.05)
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer")
        processes.wait_for_all()
        processes.everyones(None if number else time.sleep(200))
    except processes.NotAllCame as error:
        print(error, file=sys.stderr)
        watch.end(75, "")
"""


def join(num: int, number: int, port: int, breaks: bool = False) -> subprocess.Popen:
    """Starts a process that joins others, and waits for them; or for a call to them to break."""
    pipe = subprocess.PIPE
    arguments = f"127.0.0.1:{port}", str(num), str(number), str(int(breaks))
    command = [sys.executable, "-c", JOIN, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "starts\n"
    return process


@names_the_dead
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "rank", "breaks", "says"),
    [
        (3, 0, False, "process 0 died"),  # while another one waits for the third
        (2, 1, False, "process 1 died"),  # after all have met
        (2, 0, True, "process 0 died"),
    ],
)
def test_a_process_that_dies_before_it_has_done_anything_is_named(num, rank, breaks, says):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [join(num, number, port, breaks) for number in range(2)]
    if num == 3:
        time.sleep(5)  # they wait for the third
    else:
        assert [process.stdout.readline() for process in started] == ["is there\n"] * 2
    started[rank].kill()
    killed = time.monotonic()
    if (num, rank) == (3, 1):
        started.append(join(num, 2, port))
    codes, said = ended(started)
    assert time.monotonic() - killed < 60
    for number, text in enumerate(said):
        if number != rank:
            assert codes[number] == signals.RESTART, text
            assert says in text
            assert "Traceback" not in text
            assert "stack trace" not in text
            assert "    @ " not in text


def wait_for_parts(workdir: Path, num: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(workdir.glob("unfinished/*/losses-*.npz"))) < num:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@names_the_dead
@pytest.mark.parametrize(
    ("rank", "num_after"),
    [
        pytest.param(0, 1, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.long),
    ],
)
def test_killed_in_scoring_the_others_name_it_and_any_number_goes_on(
    data, alone, tmp_path, rank, num_after
):
    slow = [*SCORE, *SELECT, *data["odd"]]
    started = start(2, tmp_path, slow)
    wait_for_parts(tmp_path, 1)
    started[rank].kill()
    killed = time.monotonic()
    codes, said = ended(started)
    if codes != [0, 0]:  # else it was too late
        assert time.monotonic() - killed < 60
        assert codes[1 - rank] == signals.RESTART, said[1 - rank][-2000:]
        assert f"process {rank} died" in said[1 - rank]
    run(num_after, tmp_path, slow)
    check_same(tmp_path, alone["odd"])


def stop_when(started, workdir: Path, pattern: str) -> tuple[list[int], list[str]]:
    """Sends SIGTERM to all as soon as there is such a file; returns what `ended` does."""
    deadline = time.monotonic() + 120
    while not list(workdir.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    return ended(started)


@pytest.mark.long
def test_a_sweep_that_is_stopped_ends_as_if_it_had_not_been(data, tmp_path):
    arguments = [*SCORE, *SWEEP, *data["odd"]]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(2, whole, arguments)
    started = start(2, stopped, arguments)
    codes, said = stop_when(started, stopped, "finetune/*/*/metrics.jsonl")
    assert codes in ([signals.RESTART] * 2, [0, 0]), said
    run(2, stopped, arguments)
    check_same(stopped, whole)
    rows = [
        [row.split(",")[:6] for row in (folder / "results.csv").read_text().splitlines()]
        for folder in (whole, stopped)
    ]
    assert rows[0] == rows[1]
    tables = sorted(path.relative_to(whole) for path in whole.glob("finetune/*/*/per_class*.csv"))
    assert len(tables) == 2
    for table in tables:
        assert (whole / table).read_text() == (stopped / table).read_text()


@pytest.mark.long
def test_a_training_record_that_is_stopped_ends_as_if_it_had_not_been(data, tmp_path):
    """Only the first process keeps what the runs of a record show."""
    arguments = [*SCORE, *SWEEP, *data["odd"], "--config.stages=score,select"]
    arguments += ["--config.selection.methods=el2n,forgetting", "--config.finetune.epochs=4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(2, whole, arguments)
    started = start(2, stopped, arguments)
    codes, said = stop_when(started, stopped, "scores/training/seed_*/metrics.jsonl")
    assert codes == [signals.RESTART] * 2, said
    assert not (stopped / "scores/training/record.npz").exists()
    run(2, stopped, arguments)
    check_same(stopped, whole)
    name = "scores/training/record.npz"
    with np.load(whole / name) as a, np.load(stopped / name) as b:
        for key in set(a.files) - {"facts"}:  # seconds are among the facts
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.slow
def test_a_mistake_ends_all_with_one_line(data, tmp_path):
    codes, said = ended(start(2, tmp_path, [*SCORE, *data["odd"], "--config.mesh.probe=2"]))
    assert codes == [2, 2]
    assert "error: mesh.probe: 2 parts" in said[0]


SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "a1,a2",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
}


def only_these_are_set(monkeypatch, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROCESS_ID", "SLURM_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (
            {
                "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_STEP_NODELIST": "gpu[07-09,12],b3",
                "SLURM_JOB_ID": "30005",
                "SLURM_PROCID": "2",
            },
            ("gpu07:20005", 3, 2),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "a1,a2",
                "SLURM_JOB_ID": "7",
                "SLURM_PROCID": "0",
            },
            ("a1:20007", 2, 0),
        ),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-2]"}, None),
        ({"SLURM_STEP_NUM_TASKS": "", "SLURM_JOB_ID": "7"}, None),
        (
            SLURM | {"SLURM_STEP_NODELIST": "rack-1-n[001,004-6]"},
            ("rack-1-n001:20007", 2, 0),
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "SLURM_STEP_NUM_TASKS": "9",
            },
            ("h:1", 2, 1),
        ),
    ],
)
def test_where_a_process_stands(monkeypatch, environment, expected):
    only_these_are_set(monkeypatch, environment)
    assert processes.find_place() == expected


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is ''"),
        ({"SLURM_STEP_NODELIST": "a["}, "SLURM_STEP_NODELIST is 'a\\['"),
        ({"SLURM_STEP_NODELIST": ",a"}, "SLURM_STEP_NODELIST is ',a'"),
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a number, got 'x'"),
        ({"SLURM_PROCID": "2"}, "SLURM_PROCID is 2 of SLURM_STEP_NUM_TASKS 2"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
        ({"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID: expected a number, got '12_3'"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS: expected a number, got 'two'"),
    ],
)
def test_half_an_environment_of_slurm_is_refused(monkeypatch, changed, says):
    found = {name: value for name, value in (SLURM | changed).items() if value is not None}
    only_these_are_set(monkeypatch, found)
    with pytest.raises(dlc.InputError, match=says):
        processes.find_place()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("h:1", 2, None), "--process_id: missing"),
        ((None, 2, 0), "--coordinator_address: missing"),
        *(
            ((address, 2, 1), f"expected host:port, .*, got '{address}'")
            for address in ("h", "h:0", "h:65536", f"h:{10**30}", "a..b:1", f"{'h' * 64}:1", ":1")
        ),
        (("h:1", 2, 2), "--process_id: expected 0 to 1, got 2"),
    ],
)
def test_a_place_that_is_none(given, says):
    with pytest.raises(dlc.InputError, match=says):
        processes.find_place(*given)


def test_a_first_process_that_never_comes():
    place = processes.Place("127.0.0.1:1", 2, 1)
    with pytest.raises(processes.NotAllCame, match=r"nobody answered at 127\.0\.0\.1:1 for 1 s"):
        processes.start(place, heartbeat_s=10, timeout_s=1)
