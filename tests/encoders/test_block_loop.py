"""Blocks that are alike are compiled once; what is computed stays the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from flax import nnx

from dlc_jax.encoders.decoder import Architecture, Decoder, DecoderConfig
from dlc_jax.masking import exact_thresholds, prunable_paths, weight_importance
from dlc_jax.probes.text import _losses, _probe_losses
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Sums, TokenRows, add_rows, initial_adapter
from dlc_jax.types import by_path

TINY = DecoderConfig(
    vocab_size=64,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    windows=(None,) * 4,
    max_length=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    attention_scale=8**-0.5,
    window_rope_theta=50.0,
)
TOKENS = np.random.default_rng(0).integers(1, 64, (3, 40)).astype(np.int32)
SEGMENTS = np.repeat([[1, 1, 2, 2, 2, 0, 0, 0]], 3, axis=0).repeat(5, axis=1).astype(np.int32)
OF_BLOCK = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # bytes of a block's weights
WINDOWS = {
    "alike": (None,) * 5,
    "alternating": (7, None) * 3,
    "with a rest": (7, 7, None) * 2 + (7,),
    "without a period": (None, None, 7, 7),
    "one": (7,),
}


def made(windows, dtype="float32", **switches):
    config = dataclasses.replace(TINY, windows=windows, **switches)
    module = Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return Architecture(config, dtype), nnx.to_pure_dict(nnx.state(module))


def probes(architecture, params, masking="l1"):
    """Returns the arguments of the program of probes."""
    prunable = prunable_paths(params, architecture.is_prunable, architecture.module_order)
    importance = weight_importance(params, prunable, masking, 0)
    sizes = sum(by_path(params)[path].size for path in prunable)
    counts = np.array([0, sizes // 5, sizes // 2])
    thresholds = exact_thresholds(params, prunable, importance, counts)
    return prunable, params, importance, thresholds, TOKENS, SEGMENTS


@pytest.mark.parametrize(
    ("windows", "period"),
    [
        ((None,) * 5, 1),
        ((7, None) * 3, 2),
        ((7, 7, None) * 2 + (7,), 3),
        ((None, None, 7, 7), 4),
        ((7,), 1),
        ((), 0),
    ],
)
def test_period(windows, period):
    assert dataclasses.replace(TINY, windows=windows).period == period


@pytest.mark.parametrize("name", slow_but(["with a rest", "without a period"], WINDOWS))
def test_losses_are_those_of_blocks_one_after_the_other(name):
    architecture, params = made(WINDOWS[name])
    plain = dataclasses.replace(architecture, loops=False)
    arguments = (params, TOKENS, SEGMENTS)
    np.testing.assert_array_equal(_losses(architecture, *arguments), _losses(plain, *arguments))


@pytest.mark.slow
def test_losses_of_a_gemma_differ_by_rounding():
    """What scales its embeddings was computed with the first block before."""
    switches = {"scale_embedding": True, "sandwich": True, "offset_norm": True, "tied": True}
    caps = {"attention_cap": 5.0, "final_cap": 3.0}
    architecture, params = made(WINDOWS["alternating"], **switches, **caps)
    plain = dataclasses.replace(architecture, loops=False)
    arguments = (params, TOKENS, SEGMENTS)
    found, expected = _losses(architecture, *arguments), _losses(plain, *arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("masking", "name"),
    [("l1", "alike"), pytest.param("random", "with a rest", marks=pytest.mark.slow)],
)
def test_losses_of_probes_are_those_of_blocks_one_after_the_other(masking, name):
    architecture, params = made(WINDOWS[name])
    arguments = probes(architecture, params, masking)
    found = np.asarray(_probe_losses(architecture, *arguments))
    plain = dataclasses.replace(architecture, loops=False)
    np.testing.assert_array_equal(found, _probe_losses(plain, *arguments))
    assert (np.abs(found[0] - found[2]).max(axis=1) > 0.01).all()  # masks do something


@pytest.mark.parametrize(
    ("few", "many"), [((None,) * 2, (None,) * 12), ((7, None) * 2, (7, None) * 16)]
)
def test_a_deep_model_has_the_program_of_a_shallow_one(few, many):
    def num_products(windows):
        architecture, params = made(windows)
        losses = _losses.lower(architecture, params, TOKENS, SEGMENTS)
        of_probes = _probe_losses.lower(architecture, *probes(architecture, params))
        return [program.as_text().count("stablehlo.dot_general") for program in (losses, of_probes)]

    assert num_products(few) == num_products(many)


def test_weights_are_not_copied_as_a_whole():
    def temporary(windows):
        architecture, params = made(windows)
        program = _probe_losses.lower(architecture, *probes(architecture, params)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary((None,) * 10) < temporary((None,) * 2) + OF_BLOCK


def training(architecture, params, rematerialise):
    """Returns the program of a step's gradients, and its arguments."""
    trained = architecture.for_training(LoraConfig(rank=2).adapter, rematerialise)
    generator = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32),
        initial_adapter(trained, 0),
    )
    rows = TokenRows(TOKENS, SEGMENTS, SEGMENTS > 0)
    return trained, params, adapter, rows, Sums.zero(adapter)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rematerialise"), [("alike", False), ("with a rest", True)])
def test_gradients_are_those_of_blocks_one_after_the_other(name, rematerialise):
    trained, *arguments, sums = training(*made(WINDOWS[name]), rematerialise)
    plain = dataclasses.replace(trained, loops=False)
    found, expected = (  # sums are donated
        by_path(add_rows(some, *arguments, jax.tree.map(jnp.copy, sums)))
        for some in (trained, plain)
    )
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        size = np.linalg.norm(gradient)
        assert size > 0
        assert np.linalg.norm(found[path] - gradient) <= 1e-5 * size, path


@pytest.mark.parametrize("rematerialise", slow_but([True], [False, True]))
def test_a_deep_model_is_trained_by_the_program_of_a_shallow_one(rematerialise):
    def num_products(depth):
        lowered = add_rows.lower(*training(*made((None,) * depth), rematerialise))
        return lowered.as_text().count("stablehlo.dot_general")

    assert num_products(2) == num_products(8)


@pytest.mark.slow
def test_a_gradient_that_computes_activations_again_keeps_no_weights():
    def temporary(depth):
        lowered = add_rows.lower(*training(*made((None,) * depth), True))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    of_adapter = 4 * 2 * (4 * 64 + 2 * 48 + 3 * 80)
    more = 10 * (TOKENS.size * 32 * 4 + 3 * of_adapter)  # what ten blocks read, and their changes
    assert temporary(12) < temporary(2) + more + OF_BLOCK


def test_dropout_goes_without_a_loop():
    """Layers draw by their path."""
    architecture, _ = made((None,) * 3)
    assert architecture.is_looped(has_keys=False)
    assert not made(())[0].is_looped(has_keys=False)
    assert not architecture.is_looped(has_keys=True)
