"""One run at a time in a work directory, whatever the others want there and however one ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from dlc_jax.workspace import lease

pytestmark = pytest.mark.slow

SCORE = (
    "--config=configs/demo.py",
    "--config.encoder.image_size=32",
    "--config.probe.batch_size=8",
    "--config.selection.keep_fractions=(0.1,)",
    "--config.selection.methods=('random',)",
)


def start(workdir: Path | str, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    config, *others = arguments
    return subprocess.Popen(
        [sys.executable, "-m", "dlc_jax.main", config, f"--workdir={workdir}", *others],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out, err


def wait_for(process: subprocess.Popen, workdir: Path, pattern: str) -> None:
    deadline = time.monotonic() + 400
    while not list(workdir.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def num_probes(workdir: Path) -> int:
    with np.load(workdir / "scores" / "losses.npz") as file:
        return len(file["sparsity"])


def test_a_second_run_is_refused_at_once_whatever_it_wants(tmp_path):
    workdir = tmp_path / "run"
    # many probes: the first is to be at work until the last of the others has asked
    first = start(workdir, *SCORE, "--config.probe.num_probes=40", "--config.probe.step=0.02")
    wait_for(first, workdir, lease.FILE)
    since = json.loads((workdir / lease.FILE).read_text())["since"]
    (tmp_path / "link").symlink_to(workdir)
    config = f"--config={ROOT}/configs/demo.py"
    others = [
        start(workdir, *SCORE, "--config.probe.num_probes=3"),
        start("link", config, *SCORE[1:], cwd=tmp_path),
        start("run/../run", config, *SCORE[1:], "--config.stages=('report',)", cwd=tmp_path),
        start(workdir, *SCORE, "--config.stages=('select',)"),
    ]
    for other in others:
        _, err = ended(other, 2)
        assert f"in use: process {first.pid} on" in err
        assert f"holds it since {since}. One run at a time" in err
        assert err.count("\n") == 1
    ended(first, 0)
    assert num_probes(workdir) == 40
    assert not list(workdir.rglob(".*"))


def test_planning_needs_no_lease(tmp_path):
    with lease.held(lease.Folder(str(tmp_path))):
        ended(start(tmp_path, *SCORE, "--config.stages=('plan',)"), 0)


def test_a_run_that_was_killed_does_not_block(tmp_path):
    arguments = (*SCORE, "--config.probe.num_probes=8")
    first = start(tmp_path, *arguments)
    wait_for(first, tmp_path, "unfinished/*/losses-*")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / lease.FILE).exists()
    out, _ = ended(start(tmp_path, *arguments), 0)
    assert "waiting" not in out
    assert not list(tmp_path.rglob(".*"))


def test_a_suspended_run_is_superseded_and_writes_nothing_more(tmp_path):
    arguments = (*SCORE, "--config.probe.num_probes=8")
    first = start(tmp_path, *arguments)
    try:
        wait_for(first, tmp_path, "unfinished/*/losses-*")
        first.send_signal(signal.SIGSTOP)
        _, err = ended(start(tmp_path, *arguments), 2)
        assert f"in use: process {first.pid}" in err
        time.sleep(lease._VOID_S)
        out, _ = ended(start(tmp_path, *arguments, "--config.probe.num_probes=2"), 0)
        assert f"process {first.pid} on" in out  # it is waited for a little
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    finally:
        first.send_signal(signal.SIGCONT)
    _, err = ended(first, 75)
    assert err.startswith("stopped: ")
    assert "It writes nothing more." in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_encoder_other_than_the_scored_one_is_noted(tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(ROOT / "dlc_jax" / "datasets" / "sample", encoder)
    tensors = load_file(encoder / "model.safetensors")
    name = "conv1.weight"
    save_file({**tensors, name: tensors[name] * 2}, encoder / "model.safetensors")
    arguments = (
        *SCORE,
        "--config.probe.num_probes=2",
        "--config.finetune.epochs=0",
        "--config.finetune.full_set=False",
    )
    stages = "--config.stages=score,select,finetune"
    out, _ = ended(start(tmp_path / "run", *arguments, stages), 0)
    assert "the scores are of" not in out
    only = "--config.stages=('finetune',)"
    weights = f"--config.encoder.weights={encoder}"
    out, _ = ended(start(tmp_path / "run", *arguments, only, weights), 0)
    assert (
        f"finetune: note: the encoder is resnet18 {encoder}; the scores are of resnet18 "
        "demo:resnet18" in out
    )
