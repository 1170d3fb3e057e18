"""Convolution on CPU: XLA's own against gathered patches times a matrix, by shape.

python -m benchmarks.conv_forms [--batch_size=64]

Prints GFLOP/s of both forms, compiled as the probes are, and their ratio for the convolutions of
ResNets. Behind the rule in dlc_jax/encoders/resnet.py.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from dlc_jax.encoders import resnet
from dlc_jax.probes.kernel import COMPILER_OPTIONS

# (side, in, out, kernel size, stride)
SHAPES = [
    (64, 3, 64, 7, 2), (56, 64, 64, 3, 1), (56, 64, 256, 1, 1), (16, 64, 64, 3, 1),
    (16, 64, 128, 3, 2), (14, 256, 256, 3, 1), (14, 1024, 256, 1, 1), (8, 128, 128, 3, 1),
    (8, 128, 256, 1, 2), (7, 512, 512, 3, 1), (4, 256, 256, 3, 1), (4, 256, 512, 3, 2),
    (2, 512, 512, 3, 1), (1, 512, 512, 3, 1),
]  # fmt: skip


def rate(form, x, kernel, stride: int, flops: float) -> float:
    """Returns GFLOP/s, best of five."""
    program = jax.jit(form, static_argnums=2, compiler_options=COMPILER_OPTIONS)
    program(x, kernel, stride).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        program(x, kernel, stride).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    batch_size = parser.parse_args().batch_size
    print(f"{'side, in, out, kernel, stride':<32}{'XLA':>8}{'matmul':>8}{'ratio':>8}")
    for side, inputs, outputs, size, stride in SHAPES:
        x = jnp.ones((batch_size, side, side, inputs))
        kernel = jnp.ones((size, size, inputs, outputs))
        positions = (-(-side // stride)) ** 2
        flops = 2.0 * batch_size * positions * size**2 * inputs * outputs
        own = rate(resnet.conv2d_xla, x, kernel, stride, flops)
        matmul = rate(resnet.conv2d_matmul, x, kernel, stride, flops)
        shape = f"{side}, {inputs}, {outputs}, {size}, {stride}"
        print(f"{shape:<32}{own:8.1f}{matmul:8.1f}{matmul / own:8.2f}", flush=True)


if __name__ == "__main__":
    main()
