"""Operations counted from shapes: known values, loops, gradients, and XLA's own count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dlc_jax as dlc
from dlc_jax.encoders import ENCODERS
from dlc_jax.encoders.encoder import module_functions
from dlc_jax.planning.image_memory import ImageScoring, images_of, shapes
from dlc_jax.planning.programs import count_flops
from dlc_jax.probes.kernel import Forward, features_of_batch

Shape = jax.ShapeDtypeStruct
MACS = {"resnet18": 1.82e9, "resnet50": 4.09e9, "vit_small_patch16_224": 4.6e9}  # timm's, at 224


def whole(name: str) -> dlc.Encoder:
    """Returns an encoder whose weights are zeros."""
    architecture = ENCODERS[name]
    graph, state = nnx.split(nnx.eval_shape(lambda: architecture.build({})))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    functions = module_functions(graph, state)
    return dlc.Encoder(params=params, is_prunable=architecture.is_prunable, **functions)


def forward(encoder: dlc.Encoder, num: int, size: int) -> int:
    program = functools.partial(features_of_batch, Forward.of(encoder, "float32"))
    return count_flops(program, shapes(encoder.params), images_of(num, size))


@pytest.mark.parametrize("name", MACS)
def test_known_networks(name):
    assert forward(whole(name), 2, 224) == pytest.approx(2 * 2 * MACS[name], rel=0.05)


def test_every_probe_counts():
    encoder = whole("resnet18")
    one, many = (
        ImageScoring(encoder, 64, 15, num_probes, 1, "float32", False, 4) for num_probes in (1, 50)
    )
    counts = [count_flops(job.program(), *job.arguments()) for job in (one, many)]
    assert counts[1] == 50 * counts[0]
    assert counts[0] == pytest.approx(forward(encoder, 4, 64), rel=1e-3)  # and distances


def test_xla_counts_the_same_where_there_is_no_loop():
    def network(x, a, b):
        return jax.nn.relu(x @ a) @ b

    arguments = [Shape(shape, jnp.float32) for shape in ((32, 100), (100, 200), (200, 50))]
    counted = count_flops(network, *arguments)
    assert counted == 2 * 32 * (100 * 200 + 200 * 50)
    xla = jax.jit(network).lower(*arguments).cost_analysis()["flops"]
    assert counted <= xla <= 1.02 * counted  # it counts maxima as well


def test_loops_count_as_often_as_they_run():
    x, a = Shape((8, 16), jnp.float32), Shape((16, 16), jnp.float32)
    once = count_flops(lambda x, a: x @ a, x, a)

    def looped(x, a):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ a, x)

    assert count_flops(looped, x, a) == 7 * once
    assert jax.jit(looped).lower(x, a).cost_analysis()["flops"] < 2 * once  # why not XLA's

    def either(x, a):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ a, lambda x: x, x)

    assert count_flops(either, x, a) == once


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_convolutions_cost_two_more(stride):
    x, kernel = Shape((2, 16, 16, 8), jnp.float32), Shape((3, 3, 8, 24), jnp.float32)

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    once = count_flops(convolved, x, kernel)
    assert once == 2 * 2 * (16 // stride) ** 2 * 24 * 9 * 8
    gradient = jax.grad(lambda x, kernel: convolved(x, kernel).sum(), argnums=(0, 1))
    assert count_flops(gradient, x, kernel) == pytest.approx(3 * once, rel=1e-6)
