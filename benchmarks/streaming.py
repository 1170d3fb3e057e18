"""Peak memory of scoring a streamed image folder, small and ten times larger; and killed runs.

python -m benchmarks.streaming [--num=10000,100000] [--kills=3]

Makes folders of synthetic JPEGs, scores each with the cache off in a process of its own, and prints
the largest resident memory. Then the first one again, killed at random moments and started anew
until it ends: losses and scores must come out with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

_NUM = flags.DEFINE_list("num", ["10000", "100000"], "Images in each folder.")
_PROBES = flags.DEFINE_integer("num_probes", 8, "Probes.")
_KILLS = flags.DEFINE_integer("kills", 3, "How often to kill the first folder's run.")
_ROOT = Path(__file__).parents[1]
_NUM_CLASSES, _SIDE = 10, 96


def make_folder(root: Path, num: int) -> None:
    """Writes coarse noise, another per image, tinted by class."""

    def write(i: int) -> None:
        generator = np.random.default_rng(i)
        coarse = generator.integers(0, 200, (6, 6, 3)) + 5 * (i % _NUM_CLASSES)
        image = Image.fromarray(coarse.astype(np.uint8)).resize((_SIDE, _SIDE))
        image.save(root / f"class_{i % _NUM_CLASSES}" / f"{i:06}.jpg", quality=90)

    for label in range(_NUM_CLASSES):
        (root / f"class_{label}").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(num)))


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    """Starts scoring with the cache off."""
    command = [sys.executable, "-m", "dlc_jax.main", "--config=configs/demo.py"]
    command += [f"--workdir={workdir}", f"--config.dataset.train=folder:{folder}"]
    command += ["--config.cache.max_gib=0", "--config.encoder.image_size=32"]
    command += [f"--config.probe.num_probes={_PROBES.value}"]
    command += ["--config.probe.placement=midpoint", "--config.selection.keep_fractions=0.3"]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL)


def scored(folder: Path, workdir: Path) -> dict[str, float]:
    """Returns seconds and largest resident memory (MiB) of a whole run."""
    begin = time.perf_counter()
    process = start(folder, workdir)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"exit status {status}"
    return {"seconds": time.perf_counter() - begin, "peak_mib": usage.ru_maxrss / 1024}


def killed(folder: Path, workdir: Path, seconds: float) -> int:
    """Kills the run at random moments, then lets it end; returns the shards it went on from."""
    resumed = 0
    for _ in range(_KILLS.value):
        process = start(folder, workdir)
        time.sleep(random.uniform(0.3, 0.95) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = len(list(workdir.glob("unfinished/*/losses-*.npz")))
    assert start(folder, workdir).wait() == 0
    return resumed


def digests(workdir: Path) -> list[str]:
    """Returns the SHA-256 of what scoring wrote."""
    names = ("scores/losses.npz", "scores/scores.parquet")
    return [hashlib.sha256((workdir / name).read_bytes()).hexdigest() for name in names]


def main(_: list[str]) -> None:
    """Prints the table and a line of JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for num in map(int, _NUM.value):
            make_folder(Path(scratch) / f"images-{num}", num)
            rows.append(
                {"images": num}
                | scored(Path(scratch) / f"images-{num}", Path(scratch) / f"run-{num}")
            )
            ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
            print(
                f"{num:>8} images  {rows[-1]['seconds']:7.1f} s  "
                f"{rows[-1]['peak_mib']:7.0f} MiB  ratio {ratio:.3f}",
                flush=True,
            )
        first = int(_NUM.value[0])
        again = Path(scratch) / "run-killed"
        if _KILLS.value:
            shards = killed(Path(scratch) / f"images-{first}", again, rows[0]["seconds"])
            same = digests(again) == digests(Path(scratch) / f"run-{first}")
            print(f"killed {_KILLS.value} times, {shards} shards resumed: bytes equal: {same}")
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
