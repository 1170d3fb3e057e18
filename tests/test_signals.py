"""SIGTERM and Ctrl-C end a command with 75 and 130, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
pytestmark = pytest.mark.slow  # processes

BEGIN = """
import gc, os, sys, time
import dlc_jax.signals as signals

signals.listen()


def go_on():
    print("goes on", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        sum(range(1000))


"""
END = """
except signals.Stopped:
    print("in order", flush=True)
    signals.leave(signals.code())
print("to the end", flush=True)
"""
AT_ONCE = "go_on()\n"
IN_ORDER = "try:\n    with signals.raised():\n        go_on()"
CAUGHT = """
try:
    with signals.raised():
        try:
            go_on()
        except:
            pass
        while True:
            signals.poll()
"""
CAUGHT_AT_THE_END = """
try:
    with signals.raised():
        try:
            go_on()
        except:
            pass
"""
MADE_ANOTHER = """
try:
    with signals.raised():
        try:
            go_on()
        except BaseException:
            raise RuntimeError("of a library")
"""
IN_COLLECTOR = """
did = []


def callback(phase, info):
    if not did:
        did.append(phase)
        go_on()


gc.callbacks.append(callback)
try:
    with signals.raised():
        gc.collect()
        for _ in range(10**6):
            time.sleep(0.001)
"""
IN_FINALISER = """
class Thing:
    def __del__(self):
        go_on()


try:
    with signals.raised():
        Thing()
        for _ in range(10**6):
            time.sleep(0.001)
"""
DEFERRED = """
try:
    with signals.raised():
        with signals.deferred():
            print("goes on", flush=True)
            while not signals.asked():
                time.sleep(0.01)
            print("saved", flush=True)
"""
NEVER_ASKED = """
try:
    with signals.raised(), signals.deferred():
        go_on()
"""

IN_PYTHONS_END = """
class Last:
    def __del__(self):
        os.kill(os.getpid(), {})


last = Last()
"""


def begin(*command: str, env: dict[str, str] | None = None, ignored: bool = False):
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


def program(text: str, **options) -> subprocess.Popen:
    """Starts a program that listens, and waits until it goes on."""
    process = begin("-c", BEGIN + text + (END if "try:" in text else ""), **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "goes on\n"
    return process


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", list(CODES))
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (AT_ONCE, ""),
        (IN_ORDER, "in order\n"),
        (CAUGHT, "in order\n"),
        (CAUGHT_AT_THE_END, "in order\n"),
        (MADE_ANOTHER, "in order\n"),
        (IN_COLLECTOR, "in order\n"),
        (IN_FINALISER, "in order\n"),
        (DEFERRED, "saved\nin order\n"),
    ],
)
def test_no_stop_is_lost(number, text, says):
    process = program(text)
    process.send_signal(number)
    out, said = process.communicate(timeout=15)
    assert (process.returncode, out) == (CODES[number], says), said
    assert said.startswith("stopping"), said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", list(CODES))
@pytest.mark.parametrize("second", list(CODES))
def test_a_second_signal_ends_at_once(number, second):
    process = program(NEVER_ASKED)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    out, said = process.communicate(timeout=5)
    assert (process.returncode, out) == (CODES[number], "")
    assert said.count("stopping") == 1


def test_a_signal_sent_twice_at_the_same_moment_is_one():
    process = program(DEFERRED.replace("0.01", "0.5"))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=15)
    assert (process.returncode, out) == (75, "saved\nin order\n")


def test_what_is_ignored_from_outside_stays_ignored():
    process = program(IN_ORDER, ignored=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 75
    process.communicate()


HELP = {"main": "--config=", "check": "--dataset=", "lm_eval": "Language Model Evaluation Harness"}


@pytest.mark.parametrize("name", HELP)
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 0.4), (signal.SIGINT, 1.5)])
def test_imports_are_stopped(name, number, seconds):
    process = begin("-m", f"dlc_jax.{name}", "--help")
    while not catches(process, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    is_over = HELP[name] in out and process.returncode in (0, 1)  # too late
    assert is_over or process.returncode == CODES[number], said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", list(CODES))
def test_a_command_at_its_very_end_ends_with_its_own_code(number):
    process = begin("-c", BEGIN + IN_PYTHONS_END.format(int(number)))
    out, said = process.communicate(timeout=15)
    assert (process.returncode, out, said) == (0, "", "")


RUNS = {
    "images": ["--config=configs/demo.py", "--config.encoder.image_size=32"],
    "instructions": ["--config=configs/instructions_demo.py"],
}


@pytest.mark.parametrize(("name", "number"), [*zip(RUNS, CODES, strict=True)])
def test_a_stop_while_the_first_programs_compile(tmp_path, name, number):
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cold"), "PYTHONUNBUFFERED": "1"}
    arguments = ["-m", "dlc_jax.main", f"--workdir={tmp_path / 'run'}", *RUNS[name]]
    process = begin(*arguments, env=env)
    assert process.stdout is not None
    while "score:" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)  # compiles
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == CODES[number], said
    assert "stopping" in said
    assert "Traceback" not in said
    assert "Fatal" not in said
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_training_is_stopped_by_ctrl_c_and_goes_on_where_it_was(tmp_path):
    arguments = [
        *("-m", "dlc_jax.main", f"--workdir={tmp_path / 'run'}", *RUNS["images"]),
        "--config.probe.num_probes=2",
        "--config.selection.keep_fractions=0.1,",
        "--config.selection.splits=0.5,",
        "--config.stages=score,select,finetune",
        "--config.dataset.test=demo:caltech15/test",
        "--config.finetune.epochs=4",
    ]
    process = begin(*arguments)
    while not list(tmp_path.glob("run/finetune/*/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode in (0, 130), said
    assert "Traceback" not in said
    lines = next(iter(tmp_path.glob("run/finetune/*/*/metrics.jsonl"))).read_text()
    process = begin(*arguments)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    after = next(iter(tmp_path.glob("run/finetune/*/*/metrics.jsonl"))).read_text()
    assert after.startswith(lines)
