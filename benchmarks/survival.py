"""Kills a random process at random moments; says what is lost, and that nothing else is.

python -m benchmarks.survival [--num=20] [--seed=0]

Half of the runs score the bundled sample, half are sweeps of fine-tuning. Of two processes one is
killed (signal 9) at a random moment; the other has to end by itself; one to three processes go on,
and are killed again half of the time. Losses, kept sets and accuracies are compared with those of
a run that nobody disturbed. Prints a row per run and a summary as JSON.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_NUM = flags.DEFINE_integer("num", 20, "How many runs.")
_SEED = flags.DEFINE_integer("seed", 0, "Of moments and numbers of processes.")

_SCORE = [
    "--config=configs/demo.py",
    "--config.probe.batch_size=16",
    "--config.probe.num_probes=30",
    "--heartbeat_s=10",
]
_SWEEP = [
    "--config=configs/demo_sweep.py",
    "--config.probe.batch_size=16",
    "--config.probe.num_probes=4",
    "--config.encoder.image_size=32",
    "--config.selection.methods=flexrand",
    "--config.selection.keep_fractions=0.2,0.4",
    "--config.selection.seeds=1,",
    "--config.finetune.epochs=3",
    "--heartbeat_s=10",
]


def main(_: list[str]) -> None:
    generator = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        os.environ["XDG_CACHE_HOME"] = f"{folder}/images"
        expected, seconds = {}, {}
        for name, arguments in (("score", _SCORE), ("sweep", _SWEEP)):
            _run(2, Path(folder) / f"warm-{name}", arguments)  # compiles
            start = time.monotonic()
            _run(2, Path(folder) / name, arguments)
            seconds[name] = time.monotonic() - start
            expected[name] = _found(Path(folder) / name)
        print(f"undisturbed, two processes: {seconds}")
        rows = []
        for number in range(_NUM.value):
            name = ("score", "sweep")[number % 2]
            arguments = {"score": _SCORE, "sweep": _SWEEP}[name]
            workdir = Path(folder) / f"killed-{number}"
            row = _survive(workdir, arguments, seconds[name], generator)
            row |= {"run": name, "same": _same(_found(workdir), expected[name])}
            row["seconds_lost"] = row["seconds"] - seconds[name]
            print(row, flush=True)
            rows.append(row)
    print(
        json.dumps(
            {
                "num": len(rows),
                "num_kills": sum(len(row["kills"]) for row in rows),
                "all_same": all(row["same"] for row in rows),
                "seconds_to_notice": sorted(s for row in rows for s in row["seconds_to_notice"]),
                "median_seconds_lost": float(np.median([row["seconds_lost"] for row in rows])),
            }
        )
    )


def _survive(workdir: Path, arguments: list[str], seconds: float, generator: random.Random) -> dict:
    """Kills processes of a run until it comes to its end; returns what happened."""
    begin = time.monotonic()
    kills, noticed = [], []
    num = 2
    for _ in range(3):
        started = _start(num, workdir, arguments)
        moment = generator.uniform(0.1, 1.0) * seconds
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and any(p.poll() is None for p in started):
            time.sleep(0.05)
        rank = generator.randrange(num)
        if started[rank].poll() is None:
            started[rank].kill()
            kills.append([num, rank, round(moment, 1)])
            start = time.monotonic()
            codes = [process.wait() for process in started]
            if num > 1:
                noticed.append(round(time.monotonic() - start, 1))
            others = [code for place, code in enumerate(codes) if place != rank]
            if not set(others) <= {0, 75}:
                print(f"ended with {codes} after {moment:.1f} s: {_said(workdir)}", flush=True)
        else:
            assert [process.wait() for process in started] == [0] * num
        num = generator.choice([1, 2, 3])
        if generator.random() < 0.5:
            break
    _run(num, workdir, arguments)
    return {
        "kills": kills,
        "last": num,
        "seconds_to_notice": noticed,
        "seconds": time.monotonic() - begin,
    }


def _start(num: int, workdir: Path, arguments: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(num):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(num),
            "JAX_PROCESS_ID": str(rank),
        }
        command = [sys.executable, "-m", "dlc_jax.main", f"--workdir={workdir}", *arguments]
        with open(f"{workdir}.{rank}.txt", "w") as out:
            started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    return started


def _said(workdir: Path) -> list[str]:
    """Returns how the output of each process ends, without traces of the stack."""
    found = []
    for path in sorted(workdir.parent.glob(f"{workdir.name}.*.txt")):
        lines = [line for line in path.read_text().splitlines() if "    @" not in line]
        found.append(" | ".join(lines[-6:]))
    return found


def _run(num: int, workdir: Path, arguments: list[str]) -> None:
    assert [process.wait() for process in _start(num, workdir, arguments)] == [0] * num


def _found(workdir: Path) -> dict:
    """Returns losses, kept positions by cell, and accuracies by run."""
    with np.load(workdir / "scores/losses.npz") as file:
        losses = file["losses"]
    kept = {
        str(path.relative_to(workdir)): np.load(path).tolist()
        for path in sorted(workdir.glob("selections/**/*.npy"))
    }
    accuracies = {}
    if (results := workdir / "results.csv").exists():
        rows = [line.split(",") for line in results.read_text().splitlines()[1:]]
        accuracies = {tuple(row[:5]): float(row[5]) for row in rows}
    return {"losses": losses, "kept": kept, "accuracies": accuracies}


def _same(found: dict, expected: dict) -> bool:
    """Whether losses and kept sets are the same, and accuracies within one test image of 150.

    Another number of processes divides the batches of fine-tuning otherwise, to rounding.
    """
    close = [
        abs(found["accuracies"].get(run, np.inf) - value) <= 100 / 150 + 1e-9
        for run, value in expected["accuracies"].items()
    ]
    is_whole = np.array_equal(found["losses"], expected["losses"])
    return is_whole and found["kept"] == expected["kept"] and all(close)


if __name__ == "__main__":
    app.run(main)
