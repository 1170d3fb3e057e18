"""Seconds and memory of the selections by features and probabilities, of all samples and per class.

python -m benchmarks.geometry [--num=100000] [--dim=512] [--classes=100] [--keep=0.1]

Every row is measured in a process of its own, compilation included: the memory is the largest
resident size above that before the selection, beside the size of the features themselves.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from absl import app, flags

import dlc_jax as dlc
from dlc_jax.selection import SELECTORS

_NUM = flags.DEFINE_integer("num", 100_000, "Samples.")
_DIM = flags.DEFINE_integer("dim", 512, "Features of each.")
_CLASSES = flags.DEFINE_integer("classes", 100, "Classes, and probabilities of each sample.")
_KEEP = flags.DEFINE_float("keep", 0.1, "Fraction kept.")
_MIB = 2**20


def measure(
    method: str, per_class: bool, num: int, num_columns: int, num_classes: int, keep: float
) -> dict:
    """Returns a row of the table."""
    needs = SELECTORS[method].needs
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((num, num_columns), dtype=np.float32)
    if needs == "probabilities":
        np.exp(2 * rows, out=rows)
        rows /= rows.sum(axis=1, keepdims=True)
    labels = generator.integers(0, num_classes, num)
    before = resident()
    start = time.perf_counter()
    kept = dlc.select(
        None,
        labels,
        method=method,
        keep_fraction=keep,
        rules=dlc.Rules(per_class=per_class),
        **{needs: rows},
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "method": method,
        "groups": num_classes if per_class else 1,
        "kept": len(kept),
        "seconds": seconds,
        "data_mib": rows.nbytes / _MIB,
        "extra_mib": (peak - before) / _MIB,
    }


def resident() -> int:
    """Returns the bytes this process holds (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(_: list[str]) -> None:
    """Prints the table and a line of JSON."""
    rows = []
    print(f"{'method':<22}{'groups':>7}{'kept':>8}{'seconds':>10}{'data MiB':>10}{'extra MiB':>11}")
    context = multiprocessing.get_context("spawn")
    for method in ("moderate", "herding", "k_center_greedy", "contextual_diversity"):
        columns = _CLASSES if SELECTORS[method].needs == "probabilities" else _DIM
        for per_class in (True, False):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(
                    measure,
                    method,
                    per_class,
                    _NUM.value,
                    columns.value,
                    _CLASSES.value,
                    _KEEP.value,
                ).result()
            rows.append(row)
            print(
                f"{row['method']:<22}{row['groups']:>7}{row['kept']:>8}{row['seconds']:>10.1f}"
                f"{row['data_mib']:>10.0f}{row['extra_mib']:>11.0f}",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
