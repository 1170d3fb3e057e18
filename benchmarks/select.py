"""Seconds and memory of selecting from many samples.

python -m benchmarks.select [--num=10000000] [--num_classes=1000] [--ids] [--json=FILE]

Scores are random; FlexRand at nine keep fractions and 19 splits, in memory: what is sorted once
for all cells, the cells, and one cell by itself. The plain loop is NumPy as one would write it:
classes one by one, a sort of each, two draws.
"""

from __future__ import annotations

import resource
import time

import numpy as np
from absl import app, flags

import dlc_jax as dlc
from benchmarks.measuring import save
from dlc_jax.selection import Candidates

_NUM = flags.DEFINE_integer("num", 10_000_000, "Samples.")
_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes.")
_IDS = flags.DEFINE_bool("ids", False, "Whether draws follow ids.")
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
    ids = np.arange(_NUM.value).astype("U32") if _IDS.value else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = [time.perf_counter()]
    candidates = Candidates(scores, labels, ids=ids)
    for keep, split in _ALL:
        candidates.select(keep_fraction=keep, split=split)
        ends.append(time.perf_counter())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / _NUM.value
    seconds = np.diff(ends)
    start = time.perf_counter()
    dlc.select(scores, labels, keep_fraction=_ALL[0][0], split=_ALL[0][1], ids=ids)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    plain(scores, labels, *_ALL[0])
    loop = time.perf_counter() - start
    row = {
        "num": _NUM.value,
        "all": seconds.sum(),
        "first": seconds[0],
        "median": float(np.median(seconds)),
        "alone": alone,
        "plain": loop,
        "bytes": grown,
    }
    print(
        f"{_NUM.value:,} samples, {_CLASSES.value} classes: all {len(_ALL)} cells "
        f"{row['all']:.1f} s, the first {row['first']:.2f}, the median {row['median']:.3f}; a cell "
        f"by itself {alone:.2f}; a plain loop {loop:.2f} s a cell; {grown:.0f} bytes a sample"
    )
    save(_JSON.value, row)


if __name__ == "__main__":
    app.run(main)
