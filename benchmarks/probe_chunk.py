"""How many probes to map side by side: img x probe per second by encoder and chunk, random weights.

python benchmarks/probe_chunk.py [--encoders=resnet18:64,vit_small_patch16_224:224] [--chunks=1,2,4]

Chunk and peers alternate within one run; the medians of three rounds are printed, and their ratio
to chunk 1. Behind `probe.chunk="auto"`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import numpy as np
from flax import nnx

from dlc_jax.encoders import ENCODERS, Encoder
from dlc_jax.encoders.encoder import apply_module
from dlc_jax.masking import exact_thresholds, path_counts, prunable_paths
from dlc_jax.probes.kernel import Forward, losses_of_batch
from dlc_jax.types import by_path

_ROUNDS = 3


def random_encoder(name: str) -> Encoder:
    """Returns the architecture with its initial weights."""
    architecture = ENCODERS[name]
    graph, state = nnx.split(architecture.build({}))
    return Encoder(
        nnx.to_pure_dict(state),
        functools.partial(apply_module, graph),
        architecture.is_prunable,
        name,
        pooling="mean",
    )


def measure(encoder: Encoder, image_size: int, batch_size: int, chunks: list[int]) -> list[float]:
    """Returns img x probe per second for every chunk."""
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_probes = max(chunks)
    counts = path_counts(sum(leaves[path].size for path in prunable), num_probes=num_probes).chosen
    thresholds = jax.device_put(exact_thresholds(encoder.params, prunable, None, counts))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
    labels = np.zeros(batch_size, np.int32)
    forward = Forward.of(encoder, "float32")
    size = jax.eval_shape(lambda p, i: forward(p, i), encoder.params, images).shape[1]
    prototypes = generator.normal(size=(10, size)).astype(np.float32)

    def once(chunk: int) -> float:
        start = time.perf_counter()
        losses_of_batch(
            forward, prunable, chunk, encoder.params, None, thresholds, prototypes, images, labels
        ).block_until_ready()
        return time.perf_counter() - start

    for chunk in chunks:
        once(chunk)  # compiles
    rounds = [[once(chunk) for chunk in chunks] for _ in range(_ROUNDS)]
    return [
        batch_size * num_probes / statistics.median(column) for column in zip(*rounds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", default="resnet18:64,vit_small_patch16_224:224")
    parser.add_argument("--chunks", default="1,2,4")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    chunks = [int(chunk) for chunk in options.chunks.split(",")]
    print(f"{jax.default_backend()}, batch {options.batch_size}, img x probe / s (ratio to first)")
    print(f"{'encoder':<30}" + "".join(f"chunk {chunk:<12}" for chunk in chunks))
    for choice in options.encoders.split(","):
        name, image_size = choice.split(":")
        rates = measure(random_encoder(name), int(image_size), options.batch_size, chunks)
        cells = [f"{rate:8.1f} ({rate / rates[0]:4.2f})  " for rate in rates]
        print(f"{choice:<30}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
