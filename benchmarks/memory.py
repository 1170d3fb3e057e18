"""Device memory of scoring by encoder, images per batch and probes: planned, and where it is there.

python -m benchmarks.memory [--encoders=resnet18,vit_small_patch16_224] [--dtype=float32]
    [--json=FILE]

Megabytes of the weights, of what XLA plans beside the arguments (weights, images), and of all of it
by the stage `plan`. The measured peak, on devices that count it, covers the whole process, so it is
meaningful only where it grows from row to row. The number of samples n does not matter: images are
streamed (benchmarks/streaming.py measures the host), and losses are 4 m n bytes there.
"""

from __future__ import annotations

import jax
import numpy as np
from absl import app, flags

from benchmarks.measuring import (
    NUM_CLASSES,
    peak_bytes_in_use,
    print_rows,
    probe_arguments,
    random_encoder,
    save,
)
from dlc_jax.distributed import one_device
from dlc_jax.planning.image_memory import ImageScoring
from dlc_jax.planning.memory import tree_bytes
from dlc_jax.probes.kernel import Forward, losses_of_batches

_ENCODERS = flags.DEFINE_list("encoders", ["resnet18", "vit_small_patch16_224"], "timm's names.")
_SIZES = flags.DEFINE_list("batch_sizes", ["8", "32", "128"], "Images.")
_PROBES = flags.DEFINE_list("num_probes", ["5", "50"], "Probes.")
_SIDE = flags.DEFINE_integer("side", 224, "Pixels.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Type that the network computes in.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")


def megabytes(name: str, batch_size: int, num_probes: int) -> dict[str, float | None]:
    """Returns those of weights, beside arguments, by the plan, and measured."""
    encoder = random_encoder(name)
    forward = Forward.of(encoder, _DTYPE.value)
    images = np.zeros((batch_size, _SIDE.value, _SIDE.value, 3), np.uint8)
    prunable, arguments = probe_arguments(encoder, forward, num_probes, images)
    compiled = losses_of_batches.lower(forward, prunable, 1, one_device(), *arguments).compile()
    if peak_bytes_in_use() is not None:
        jax.block_until_ready(compiled(*arguments))
    plan = ImageScoring(
        encoder, _SIDE.value, NUM_CLASSES, num_probes, 1, _DTYPE.value, False, batch_size
    ).plan()
    found = {
        "weights": tree_bytes(encoder.params),
        "beside": compiled.memory_analysis().temp_size_in_bytes,
        "plan": plan.num_bytes,
        "measured": peak_bytes_in_use(),
    }
    return {key: None if value is None else value / 1e6 for key, value in found.items()}


def main(_: list[str]) -> None:
    print("| encoder | images | probes | weights | beside arguments | plan | measured |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in _ENCODERS.value:
        for batch_size in map(int, _SIZES.value):
            for num_probes in map(int, _PROBES.value):
                found = megabytes(name, batch_size, num_probes)
                row = {"encoder": name, "images": batch_size, "probes": num_probes}
                rows.append(row | found)
                print_rows(rows[-1:])
                save(_JSON.value, rows)


if __name__ == "__main__":
    app.run(main)
