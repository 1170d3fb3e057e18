"""What the programs cost, without timing anything: compilations, decoding, operations, memory.

A number that grows here made every run slower or larger; one that falls may be written down anew.
"""

import functools

import jax
import numpy as np
import pytest
from conftest import XLA_IS_OLD

import dlc_jax as dlc
from benchmarks.measuring import probe_arguments, random_encoder
from dlc_jax.distributed import one_device
from dlc_jax.planning.programs import count_flops, inner_programs, traced
from dlc_jax.preprocess import images
from dlc_jax.probes.kernel import Forward, features_of_batches, losses_of_batches
from dlc_jax.training.images.data import Batch
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Sums, TokenRows, add_rows, initial_adapter

SLACK = 1.05


@functools.cache
def encoder_of(name):
    if name == "sample":
        return dlc.load_encoder("resnet18", "demo:resnet18")
    return random_encoder(name)


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def probe_program(name, image_size, batch_size, num_probes):
    encoder = encoder_of(name)
    forward = Forward.of(encoder, "float32")
    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    prunable, arguments = probe_arguments(encoder, forward, num_probes, images)
    lowered = losses_of_batches.lower(forward, prunable, 1, one_device(), *arguments)
    return lowered.compile(), count_flops(forward.__call__, encoder.params, images)


# encoder, pixels, images; bytes beside the arguments, measured with jaxlib 0.10.2
CASES = [
    ("sample", 64, 16, 7.07e6),
    pytest.param("vit_small_patch16_224", 224, 2, 98.9e6, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "image_size", "batch_size", "num_bytes"), CASES)
def test_a_probe_costs_one_forward_pass(name, image_size, batch_size, num_bytes):
    compiled, flops = probe_program(name, image_size, batch_size, 3)
    # the body of the loop over probes is counted once; batch norm, masks and losses are little
    least = 0.99 if XLA_IS_OLD else 1.0  # that of 0.8 counts fewer operations of a convolution
    assert least * flops <= compiled.cost_analysis()["flops"] <= 1.05 * flops


@pytest.mark.parametrize(("name", "image_size", "batch_size", "num_bytes"), CASES)
def test_ynnpack_does_not_compute_convolutions_or_matmuls(name, image_size, batch_size, num_bytes):
    compiled, _ = probe_program(name, image_size, batch_size, 3)
    assert "__ynn_fusion" not in compiled.as_text()


@pytest.mark.parametrize(("name", "image_size", "batch_size", "num_bytes"), CASES)
def test_memory_holds_one_masked_copy_whatever_the_number_of_probes(
    name, image_size, batch_size, num_bytes
):
    few = probe_program(name, image_size, batch_size, 3)[0].memory_analysis()
    assert few.temp_size_in_bytes <= SLACK * num_bytes
    if name == "sample":
        many = probe_program(name, image_size, batch_size, 12)[0].memory_analysis()
        assert many.temp_size_in_bytes == few.temp_size_in_bytes


@pytest.mark.slow
def test_a_training_step_costs_three_forward_passes():
    encoder = encoder_of("sample")
    images = np.zeros((16, 64, 64, 3), np.uint8)
    batch = Batch.padded(images, np.zeros(16, np.int32), 16)
    head = initial_head(128, 15, "mean", 0)
    sgd = Sgd(0.9, 1e-5, True)
    state = TrainState.start(encoder.params, encoder.statistics, head, sgd)
    compiled = train_step.lower(
        Network.of(encoder, "float32"), sgd, state, *batch, np.float32(0.1)
    ).compile()
    forward = Forward.of(encoder, "float32")
    flops = count_flops(lambda params, some: forward(params, some), encoder.params, images)
    # the images have no gradient, which saves part of the first convolution's
    assert 2.5 * flops <= compiled.cost_analysis()["flops"] <= 3.2 * flops
    assert compiled.memory_analysis().temp_size_in_bytes <= SLACK * 11.74e6


def products(program):
    """Yields whether each matmul and convolution is of float32, and its precision."""
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            is_float32 = equation.invars[0].aval.dtype == np.float32
            yield is_float32, equation.params["precision"]
        for inner in inner_programs(equation.params):
            yield from products(inner)


HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def of_images(dtype):
    encoder = encoder_of("sample")
    batch = Batch.padded(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int32), 4)
    sgd = Sgd(0.9, 1e-5, True)
    state = TrainState.start(
        encoder.params, encoder.statistics, initial_head(128, 15, "mean", 0), sgd
    )
    step = functools.partial(train_step, Network.of(encoder, dtype), sgd)
    return step, (state, *batch, np.float32(0.1))


def of_text(dtype):
    model = dlc.load_language_model("demo:tiny-llama", dtype=dtype)
    architecture = model.architecture.with_adapter(LoraConfig().adapter)
    adapter = initial_adapter(architecture, 0)
    tokens = np.ones((2, 16), np.int32)
    rows = TokenRows(tokens, tokens, tokens > 0)
    add = functools.partial(add_rows, architecture)
    return add, (model.params, adapter, rows, Sums.zero(adapter))


@pytest.mark.parametrize("made", [of_images, of_text])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_not_tf32_on_gpus(made, dtype):
    function, arguments = made(dtype)
    found = list(products(traced(function, *arguments)))
    float32 = [precision for is_float32, precision in found if is_float32]
    assert float32
    # attention's gradient in bfloat16 multiplies float32 by bfloat16, and JAX says how
    by_jax = {jax.lax.DotAlgorithmPreset.BF16_BF16_F32} if dtype == "bfloat16" else set()
    assert set(float32) - by_jax == {HIGHEST}
    assert (len(float32) < len(found)) == (dtype == "bfloat16")


@pytest.fixture
def counted(monkeypatch):
    """How many images are decoded."""
    numbers = []
    plain = images.decode

    def decode(*args, **kwargs):
        numbers.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(images, "decode", decode)
    return numbers


@pytest.mark.slow
def test_images_are_decoded_once_with_a_cache_and_twice_without(
    sample_encoder, small_sample, counted, tmp_path
):
    options = {"image_size": 32, "num_probes": 3, "compute": dlc.Compute(batch_size=16)}
    dlc.probe(sample_encoder, small_sample, **options)
    assert len(counted) == 2 * len(small_sample)
    counted.clear()
    cache = dlc.ImageCache(folder=str(tmp_path))
    dlc.probe(sample_encoder, dlc.Images(small_sample, cache=cache), **options)
    assert len(counted) == len(small_sample)
    counted.clear()
    path = dlc.PathSpec(num_probes="auto", agreement=1.0, step=0.1)
    auto = {"image_size": 32, "path": path, "compute": dlc.Compute(batch_size=16)}
    dlc.probe(sample_encoder, dlc.Images(small_sample, cache=cache), **auto)
    dlc.features(sample_encoder, dlc.Images(small_sample, cache=cache), image_size=32)
    assert not counted


@pytest.mark.slow
def test_each_program_is_compiled_once(sample_encoder, small_sample):
    options = {"image_size": 40, "compute": dlc.Compute(batch_size=16)}  # the last batch is smaller
    programs = (features_of_batches, losses_of_batches)
    before = [program._cache_size() for program in programs]
    dlc.probe(sample_encoder, small_sample, num_probes=3, **options)
    dlc.probe(sample_encoder, small_sample, num_probes=3, masking="random", **options)
    dlc.features(sample_encoder, small_sample, **options)
    after = [program._cache_size() for program in programs]
    # importances that are given are another argument
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 2]
    dlc.probe(sample_encoder, small_sample, num_probes=3, schedule="geometric", **options)
    assert [program._cache_size() for program in programs] == after
