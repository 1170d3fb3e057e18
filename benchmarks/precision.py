"""Whether bfloat16 ranks as float32 does, on real images.

python -m benchmarks.precision [--dataset=demo:caltech15/train] [--weights=demo:resnet18]
    [--encoder=resnet18] [--image_size=64] [--num_probes=50] [--json=FILE]

Scores the data set twice and prints Spearman within classes, and how much of each kept set is the
same: of the easiest and hardest, and of FlexRand, by keep fraction.
"""

from __future__ import annotations

import time

import numpy as np
from absl import app, flags

import dlc_jax as dlc
from benchmarks.measuring import flexrand_overlap, save
from dlc_jax.probes.certificate import compare
from dlc_jax.types import KEEP_FRACTIONS

_DATASET = flags.DEFINE_string("dataset", "demo:caltech15/train", "Source.")
_ENCODER = flags.DEFINE_string("encoder", "resnet18", "Its architecture.")
_WEIGHTS = flags.DEFINE_string("weights", "demo:resnet18", "Its weights.")
_SIZE = flags.DEFINE_integer("image_size", 64, "Pixels.")
_PROBES = flags.DEFINE_integer("num_probes", 50, "Probes; fewer than 50 are midpoints.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images.")
_JSON = flags.DEFINE_string("json", None, "Where the result is written too.")


def main(_: list[str]) -> None:
    dataset = dlc.load_dataset(_DATASET.value)
    encoder = dlc.load_encoder(_ENCODER.value, _WEIGHTS.value)
    scores, seconds, losses = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        start = time.perf_counter()
        probes = dlc.probe(
            encoder,
            dlc.Images(dataset, cache=dlc.ImageCache()),
            num_probes=_PROBES.value,
            image_size=_SIZE.value,
            path=dlc.PathSpec(placement="midpoint"),
            compute=dlc.Compute(batch_size=_BATCH.value, dtype=dtype),
        )
        seconds[dtype] = time.perf_counter() - start
        losses[dtype], scores[dtype] = probes.losses, dlc.score(probes)
    found = compare(scores["float32"], scores["bfloat16"], dataset.labels)
    print(f"spearman within classes {found.spearman:.5f}; seconds {seconds}")
    print("loss, largest difference:", np.abs(losses["float32"] - losses["bfloat16"]).max())
    print("| keep fraction | easiest | hardest | flexrand |\n|---|---|---|---|")
    rows = []
    for share in KEEP_FRACTIONS:
        same = flexrand_overlap(scores["float32"], scores["bfloat16"], dataset.labels, share)
        rows.append([share, found.easiest[share], found.hardest[share], same])
        print("| " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |")
    save(_JSON.value, {"spearman": found.spearman, "seconds": seconds, "overlaps": rows})


if __name__ == "__main__":
    app.run(main)
