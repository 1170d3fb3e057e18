"""Device memory of scoring by encoder, images per batch and probes; no program is run.

python -m benchmarks.memory [--encoders=resnet18,vit_small_patch16_224] [--json=FILE]

Megabytes that XLA plans beside the arguments (weights, images), and the weights. The number of
samples n is not among them: images are streamed (benchmarks/streaming.py measures the host), and
losses are 4 m n bytes there.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks.measuring import random_encoder
from dlc_jax.distributed import one_device
from dlc_jax.masking import exact_thresholds, path_counts, prunable_paths
from dlc_jax.probes.kernel import Forward, losses_of_batches
from dlc_jax.types import by_path

_ENCODERS = flags.DEFINE_list("encoders", ["resnet18", "vit_small_patch16_224"], "timm's names.")
_SIZES = flags.DEFINE_list("batch_sizes", ["8", "32", "128"], "Images.")
_PROBES = flags.DEFINE_list("num_probes", ["5", "50"], "Probes.")
_SIDE = flags.DEFINE_integer("side", 224, "Pixels.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")


def planned(name: str, batch_size: int, num_probes: int) -> tuple[float, float]:
    """Returns megabytes of weights, and of what is held beside arguments."""
    encoder = random_encoder(name)
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[path].size for path in prunable)
    counts = path_counts(num_weights, num_probes=num_probes).chosen
    thresholds = exact_thresholds(encoder.params, prunable, None, counts)
    forward = Forward.of(encoder, "float32")
    images = np.zeros((1, batch_size, _SIDE.value, _SIDE.value, 3), np.uint8)
    width = jax.eval_shape(lambda p, i: forward(p, i), encoder.params, images[0]).shape[1]
    compiled = losses_of_batches.lower(
        forward, prunable, 1, one_device(), encoder.params, None, thresholds,
        np.ones((10, width), np.float32), images, np.zeros((1, batch_size), np.int32),
    ).compile()  # fmt: skip
    return num_weights * 4e-6, compiled.memory_analysis().temp_size_in_bytes / 1e6


def main(_: list[str]) -> None:
    print(
        "| encoder | images | probes | weights, MB | beside arguments, MB |\n|---|---|---|---|---|"
    )
    rows = []
    for name in _ENCODERS.value:
        for batch_size in map(int, _SIZES.value):
            for num_probes in map(int, _PROBES.value):
                weights, beside = planned(name, batch_size, num_probes)
                rows.append([name, batch_size, num_probes, weights, beside])
                print(
                    f"| {name} | {batch_size} | {num_probes} | {weights:.0f} | {beside:.0f} |",
                    flush=True,
                )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
