"""How much faster scoring and fine-tuning are with more processes, each pinned to a core.

python -m benchmarks.scaling [--repeats=3]

The bundled sample at 64 px: what 45 more probes take in batches of 16 (50 probes less 5, since on
CPUs all processes but the first compile anew at every start), and an epoch of fine-tuning in
batches of 32, the second. Efficiency is the time of one process on one core, over the time of P
processes on P cores times P. Prints one table and JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

_REPEATS = flags.DEFINE_integer("repeats", 3, "Medians are of so many runs.")

_SCORE = ["--config=configs/demo.py", "--config.probe.batch_size=16"]
_TUNE = [
    "--config=configs/demo_sweep.py",
    "--config.probe.batch_size=16",
    "--config.probe.num_probes=2",
    "--config.selection.methods=random",
    "--config.selection.keep_fractions=0.1,",
    "--config.selection.seeds=1,",
    "--config.finetune.epochs=3",
]


def main(_: list[str]) -> None:
    num_cores = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16) if count <= num_cores]
    seconds: dict[str, dict[int, list[float]]] = {"45 probes": {}, "epoch": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        os.environ["XDG_CACHE_HOME"] = f"{folder}/images"
        for repeat in range(_REPEATS.value + 1):  # the first compiles and decodes
            for count in counts:
                run = Path(folder) / f"{count}-{repeat}"
                few, many = (_score(count, run / str(num), num) for num in (5, 50))
                epoch = _epoch(count, run / "finetune")
                if repeat:
                    seconds["45 probes"].setdefault(count, []).append(many - few)
                    seconds["epoch"].setdefault(count, []).append(epoch)
    rows = []
    print("| | processes | seconds | times as fast | efficiency |\n|---|---|---|---|---|")
    for name, by_count in seconds.items():
        one = float(np.median(by_count[1]))
        for count, some in by_count.items():
            median = float(np.median(some))
            rows.append({"what": name, "processes": count, "seconds": some})
            faster = one / median
            print(f"| {name} | {count} | {median:.2f} | {faster:.2f} | {faster / count:.2f} |")
    print(json.dumps(rows))


def _score(count: int, workdir: Path, num_probes: int) -> float:
    _run(count, workdir, [*_SCORE, f"--config.probe.num_probes={num_probes}"])
    found = json.loads((workdir / "provenance.json").read_text())
    return float(found["stages"]["score"]["seconds"])


def _epoch(count: int, workdir: Path) -> float:
    _run(count, workdir, _TUNE)
    lines = (workdir / "finetune/full/keep_1.00-seed_1/metrics.jsonl").read_text().splitlines()
    elapsed = [json.loads(line)["elapsed_s"] for line in lines]
    return float(elapsed[1] - elapsed[0])


def _run(count: int, workdir: Path, arguments: list[str]) -> None:
    env = os.environ | {"DLC_JAX_CORES": "1"}
    command = ["bash", "launch/local.sh", str(count), f"--workdir={workdir}", *arguments]
    subprocess.run(command, env=env, check=True, capture_output=True)


if __name__ == "__main__":
    app.run(main)
