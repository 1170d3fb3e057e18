"""Whether the rank certificate is honest: how often its intervals hold the truth.

python -m benchmarks.certificate LOSSES... [--share=0.5] [--num=20]

LOSSES are files `scores/losses.npz` of runs under all probes of their path (`probe.num_probes=50`).
From each, `num` random parts of the samples are taken. Of every part, the certificate of 3 to 15
midpoint probes is compared with what all probes say: Spearman within classes, and kept sets at nine
keep fractions, of the easiest and of the hardest. Prints one table.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags

from dlc_jax.probes.certificate import Interval, certify, compare
from dlc_jax.types import KEEP_FRACTIONS, ProbeLosses

_SHARE = flags.DEFINE_float("share", 0.5, "Of the samples, in a part.")
_NUM = flags.DEFINE_integer("num", 20, "Parts.")


def main(arguments: list[str]) -> None:
    print("| losses | probes | coverage: spearman | easiest | hardest | spearman: said, true |")
    print("|---|---|---|---|---|---|")
    for path in arguments[1:]:
        with np.load(path, allow_pickle=False) as file:
            losses, labels = file["losses"], file["labels"]
        for num_probes in (3, 4, 5, 8, 15):
            print(f"| {path} | {num_probes} | {_row(losses, labels, num_probes)} |", flush=True)


def _row(losses: np.ndarray, labels: np.ndarray, num_probes: int) -> str:
    num_steps, num = losses.shape
    steps = (2 * np.arange(num_probes) + 1) * num_steps // (2 * num_probes)
    held: dict[str, list[bool]] = {"spearman": [], "easiest": [], "hardest": []}
    said, true = [], []
    for seed in range(_NUM.value):
        chosen = np.random.default_rng(seed).choice(num, round(num * _SHARE.value), replace=False)
        part, of = losses[:, np.sort(chosen)], labels[np.sort(chosen)]
        probes = ProbeLosses(
            losses=part[steps],
            sparsity=np.zeros(num_probes, np.float32),
            labels=of,
            ids=np.arange(len(of)).astype(np.str_),
            prototypes=np.zeros((1, 0), np.float32),
            class_names=(),
            steps=steps,
            num_steps=num_steps,
        )
        found = certify(probes, seed=seed)
        truth = compare(part[steps].mean(axis=0), part.mean(axis=0), of, KEEP_FRACTIONS)
        said.append(found.spearman.estimate)
        true.append(truth.spearman)
        held["spearman"].append(_holds(found.spearman, truth.spearman))
        for method in ("easiest", "hardest"):
            for share, interval in getattr(found, method).items():
                held[method].append(_holds(interval, getattr(truth, method)[share]))
    shares = " | ".join(f"{np.mean(some):.3f}" for some in held.values())
    return f"{shares} | {np.mean(said):.4f}, {np.mean(true):.4f}"


def _holds(found: Interval, value: float) -> bool:
    return found.low - 1e-9 <= value <= found.high + 1e-9


if __name__ == "__main__":
    app.run(main)
