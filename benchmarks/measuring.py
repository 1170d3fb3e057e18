"""What several benchmarks have in common; no flags, since each has its own."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

import dlc_jax as dlc
from dlc_jax.encoders import ENCODERS, Encoder
from dlc_jax.encoders.encoder import apply_module
from dlc_jax.preprocess import decode


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


def peak(dtype: str) -> float:
    """Returns the FLOP/s of a square matrix product, the best of several."""
    side = 8192 if jax.default_backend() != "cpu" else 2048
    matrix = jnp.ones((side, side), dtype)
    precision = "highest" if dtype == "float32" else "default"
    product = jax.jit(lambda a: jnp.dot(a, a, precision=precision))
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def measured(calls: dict[str, Callable[[], None]], num_rounds: int = 5) -> dict[str, float]:
    """Returns the median seconds of calls that take turns; the first of each is not counted."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in seconds.items()}


def enlarged_sample(root: Path) -> Path:
    """Writes the bundled photographs as JPEGs whose shorter side is 375 pixels."""
    sample = dlc.load_dataset("demo:caltech15/train")
    for position in range(len(sample)):
        image = decode(sample[position].image, "")
        scale = 375 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        path = root / str(sample.ids[position])
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return root
