"""Seconds and memory of selecting from many samples.

python -m benchmarks.select [--num=10000000] [--num_classes=1000] [--cells=6] [--json=FILE]

Scores are random; FlexRand at some of nine keep fractions and 19 splits, in the order in which the
stage `select` goes through them. What all 171 take is scaled up. The plain loop is NumPy as one
would write it: classes one by one, a sort of each, two draws.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
from absl import app, flags

import dlc_jax as dlc

_NUM = flags.DEFINE_integer("num", 10_000_000, "Samples.")
_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes.")
_CELLS = flags.DEFINE_integer("cells", 6, "How many of the 171 are timed.")
_JSON = flags.DEFINE_string("json", None, "Where the result is written too.")
_ALL = [(keep / 10, split / 20) for split in range(1, 20) for keep in range(1, 10)]


def plain(scores: np.ndarray, labels: np.ndarray, keep: float, split: float) -> np.ndarray:
    """Returns the kept positions."""
    generator = np.random.default_rng(0)
    kept = []
    for label in range(_CLASSES.value):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(scores[rows])]
        pool, num = round(len(rows) * split), round(len(rows) * keep)
        easy = min(pool, num // 2)
        kept.append(generator.permutation(rows[:pool])[:easy])
        kept.append(generator.permutation(rows[pool:])[: num - easy])
    return np.sort(np.concatenate(kept))


def main(_: list[str]) -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(_NUM.value, np.float32)
    labels = generator.integers(0, _CLASSES.value, _NUM.value).astype(np.int32)
    chosen = _ALL[:: len(_ALL) // _CELLS.value][: _CELLS.value]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for keep, split in chosen:
        dlc.select(scores, labels, keep_fraction=keep, split=split)
    each = (time.perf_counter() - start) / len(chosen)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / _NUM.value
    start = time.perf_counter()
    plain(scores, labels, *chosen[0])
    loop = time.perf_counter() - start
    row = {"num": _NUM.value, "seconds": each, "all": each * 171, "bytes": grown, "plain": loop}
    print(
        f"{_NUM.value:,} samples, {_CLASSES.value} classes: {each:.2f} s a cell, "
        f"{each * 171:.0f} s for 171, {grown:.0f} bytes a sample; a plain loop {loop:.2f} s a cell"
    )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
