"""How often `auto` is wrong where nothing is better, and right where something is: simulation.

python -m benchmarks.auto_power [--sets=100]

Outcomes of held-out samples are drawn: samples differ in how easily they are right, and each way of
choosing has its own tendency for each sample and each repeat. 24 ways are compared with random
pruning in 25 repeats, once where none is better and once where the first is by some points. Prints
how often something else than random is chosen, or the first is, by three tests: the variance of
samples plus that of repeats and Bonferroni's correction, as it was up to 2026-11; what is in both
counted once; and that with Dunnett's correction, as `dlc.tune` does it.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from jaxtyping import Bool
from scipy import stats

from dlc_jax.reports.table import markdown
from dlc_jax.tuning.gaps import ChancePart, HeldOut, gap, likeness_of, of_many
from dlc_jax.types import Gap

_WAYS, _REPEATS, _LEVEL = 24, 25, 0.05
_OWN, _OF_REPEAT = 0.1, 0.01  # deviations of tendencies, by sample and by repeat


def with_sum(difference: np.ndarray, held_out: HeldOut) -> Gap:
    """Returns a gap whose variance is the sum of both parts, with r - 1 degrees of freedom."""
    repeats = held_out.repeat.ravel()
    of_repeats = np.bincount(repeats, difference.ravel()) / np.bincount(repeats)
    means = difference.mean(axis=0, dtype=np.float64)
    error = math.sqrt(ChancePart.of_mean(means).variance + ChancePart.of_mean(of_repeats).variance)
    freedom, mean = len(of_repeats) - 1, float(means.mean())
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Gap(mean, half, float(stats.t.sf(mean / error, freedom)))


def outcomes(num_samples: int, gain: float, seed: int) -> tuple[HeldOut, Bool[np.ndarray, "w p n"]]:
    """Returns when samples were held out, and whether they were right; random pruning first."""
    generator, places = np.random.default_rng(seed), np.arange(num_samples)
    partitions = _REPEATS // 5
    repeat = np.stack([5 * p + generator.permutation(places) % 5 for p in range(partitions)])
    easy, found = generator.beta(2, 0.6, num_samples), []
    for way in range(_WAYS + 1):
        own = generator.normal(gain if way == 1 else 0, _OWN, num_samples)
        of_repeat = generator.normal(0, _OF_REPEAT, _REPEATS)[repeat]
        found.append(generator.random(repeat.shape) < easy + own + of_repeat)
    return HeldOut(repeat, _REPEATS), np.stack(found)


def chosen(gaps: list[Gap], p_values: list[float]) -> int:
    """Returns the best that is better beyond noise, from 1; 0 if none is."""
    sure = [k for k, p in enumerate(p_values) if gaps[k].mean > 0 and p <= _LEVEL]
    return 1 + max(sure, key=lambda k: gaps[k].mean) if sure else 0


def choices(num_samples: int, gain: float, seed: int) -> list[int]:
    """Returns what each of the three tests chooses."""
    held_out, right = outcomes(num_samples, gain, seed)

    differences = 100 * (right[1:].astype(np.float32) - right[0])
    sums, once = ([of(one, held_out) for one in differences] for of in (with_sum, gap))
    alone = [found.p_value for found in once]
    return [
        chosen(sums, [_WAYS * found.p_value for found in sums]),
        chosen(once, [_WAYS * p for p in alone]),
        chosen(once, of_many(alone, likeness_of(differences.reshape(_WAYS, -1)))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100, help="data sets of each kind")
    parser.add_argument("--gain", type=float, default=2.0, help="points that the first is better")
    asked = parser.parse_args()
    rows = []
    for num_samples in (400, 1200, 4000):
        for gain in (0.0, asked.gain):
            found = np.array([choices(num_samples, gain / 100, seed) for seed in range(asked.sets)])
            share = 100 * (found == 1 if gain else found > 0).mean(axis=0)
            what = f"the first by {gain:g}: it" if gain else "none: another than random"
            rows.append((f"{num_samples:,}", what, *(f"{value:.0f} %" for value in share)))
    tests = ("sum, Bonferroni", "once, Bonferroni", "once, Dunnett")
    print(markdown(("samples", "better is, chosen", *tests), rows))


if __name__ == "__main__":
    main()
