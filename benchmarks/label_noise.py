"""Labels that were made wrong, and how many of them are found: by probes and by linear heads.

python -m benchmarks.label_noise [--data=demo:caltech15/train --weights=demo:resnet18
    --encoder=resnet18 --image_size=64] [--num_probes=8] [--seeds=0,1,2] [--noise=0.05]

Five per cent of the labels become another class's, by lot. Each way ranks all samples, and the
table has the share of the most suspect five per cent whose labels were made wrong, which is the
share of wrong labels found, too. Labels of the data that were wrong before count as right. With
cleanlab (AGPL, `pip install cleanlab`), it is given the same out-of-sample probabilities. Features
are measured once; the probe pass once for every seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time

import numpy as np

import dlc_jax as dlc
from dlc_jax.tuning import held_out_probabilities


def with_noise(data: dlc.Dataset, share: float, seed: int) -> tuple[dlc.Dataset, np.ndarray]:
    """Returns the data with some labels made wrong, and [n] which."""
    generator = np.random.default_rng(seed)
    num = round(share * len(data))
    wrong = generator.choice(len(data), num, replace=False)
    labels = data.labels.copy()
    labels[wrong] += generator.integers(1, data.num_classes, num)
    is_wrong = np.zeros(len(data), bool)
    is_wrong[wrong] = True
    return dataclasses.replace(data, labels=labels % data.num_classes), is_wrong


def precision(suspicion: np.ndarray, is_wrong: np.ndarray) -> float:
    """Returns the share of wrong labels among as many of the most suspect samples."""
    worst = np.argsort(-suspicion, kind="stable")[: is_wrong.sum()]
    return float(is_wrong[worst].mean())


def by_cleanlab(probabilities: np.ndarray, labels: np.ndarray, is_wrong: np.ndarray) -> dict:
    """Returns what cleanlab finds, nothing where it is not installed."""
    if importlib.util.find_spec("cleanlab") is None:
        return {}
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    quality = get_label_quality_scores(labels, probabilities)
    issues = find_label_issues(
        labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    first = np.zeros(len(labels))  # those that it finds, before all others
    first[issues] = 2 + np.arange(len(issues), 0, -1)
    found = {
        "cleanlab, label quality": precision(-quality, is_wrong),
        "cleanlab, find_label_issues first": precision(np.where(first, first, -quality), is_wrong),
    }
    of_them = is_wrong[issues]
    print(f"find_label_issues: {len(issues)} samples, {of_them.sum()} of them wrong", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo:caltech15/train", help="source, as dataset.train")
    parser.add_argument("--encoder", default=None, help="None: what the weights name")
    parser.add_argument("--weights", default="demo:resnet18")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_probes", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--noise", type=float, default=0.05)
    given = parser.parse_args()
    dlc.use_all_cores()
    data = dlc.load_dataset(given.data)
    encoder = dlc.load_encoder(given.encoder, given.weights)
    run = dlc.Run(mesh=dlc.make_mesh())
    features = dlc.features(encoder, data, image_size=given.image_size, run=run)
    path = dlc.PathSpec(num_probes=given.num_probes, placement="midpoint")
    rows: dict[str, list[float]] = {}
    for seed in map(int, given.seeds.split(",")):
        noisy, is_wrong = with_noise(data, given.noise, seed)
        start = time.perf_counter()
        probes = dlc.probe(encoder, noisy, image_size=given.image_size, path=path, run=run)
        seconds = time.perf_counter() - start
        suspects = dlc.suspect_labels(probes)
        print(
            f"seed {seed}: {suspects.is_informative.sum()} of {given.num_probes} probes carry "
            f"information; {suspects.is_suspect.sum()} suspects, "
            f"{(suspects.is_suspect & is_wrong).sum()} of {is_wrong.sum()} wrong labels among them;"
            f" {seconds:.0f} s",
            flush=True,
        )
        probabilities = held_out_probabilities(features, noisy.labels, ids=data.ids, seed=seed)
        confidence = probabilities[np.arange(len(data)), noisy.labels]
        found = {
            "probes, suspects first": precision(
                np.where(suspects.is_suspect, 100, 0) + suspects.scores, is_wrong
            ),
            "probes, loss alone": precision(suspects.scores, is_wrong),
            "linear heads, self-confidence": precision(-confidence, is_wrong),
        }
        found |= by_cleanlab(probabilities, noisy.labels, is_wrong)
        suggested = suspects.suggested == data.labels
        found["right class suggested, of wrong ones"] = float(suggested[is_wrong].mean())
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    print(f"| {data.name}, {len(data)} samples | mean | each seed |\n|---|--:|---|")
    for name, values in rows.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {np.mean(values):.3f} | {each} |")


if __name__ == "__main__":
    main()
