"""The compiled step: padding, batch norm, dtypes, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.encoders.encoder import normalise
from dlc_jax.encoders.resnet import BatchNorm, conv2d, max_pool
from dlc_jax.training.images.data import Batch
from dlc_jax.training.images.step import (
    Network,
    Sgd,
    TrainState,
    initial_head,
    predicted_classes,
    train_step,
)
from dlc_jax.types import by_path

SGD = Sgd(momentum=0.9, weight_decay=1e-3, nesterov=True)


def one_step(encoder: dlc.Encoder, batch: Batch, dtype: str = "float32"):
    head = initial_head(128, 15, "mean", 0)
    state = TrainState.start(encoder.params, encoder.statistics, head, SGD)
    return train_step(Network.of(encoder, dtype), SGD, state, *batch, jnp.float32(0.1))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5])
def test_padding_changes_nothing(sample_encoder, size):
    images, labels = random_images(8, 64), np.arange(8, dtype=np.int32)
    short = Batch.padded(images[:size], labels[:size], 8)
    assert short.real.tolist() == [1.0] * size + [0.0] * (8 - size)
    alone, metrics_alone = one_step(
        sample_encoder, Batch.padded(images[:size], labels[:size], size)
    )
    padded, metrics = one_step(sample_encoder, short)
    assert float(metrics.loss) == pytest.approx(float(metrics_alone.loss), abs=1e-5)
    assert int(metrics.correct.sum()) == int(metrics_alone.correct.sum())
    for path, leaf in by_path(alone.weights()).items():
        np.testing.assert_allclose(by_path(padded.weights())[path], leaf, atol=2e-4, err_msg=path)
    # what stands in the padding does not matter either
    garbage = short._replace(
        inputs=np.where(short.real[:, None, None, None] > 0, short.inputs, 255)
    )
    other, _ = one_step(sample_encoder, garbage)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**16))
def test_batch_norm_is_torchs_on_the_real_samples(real, side, padding, seed):
    torch = pytest.importorskip("torch")
    if real * side * side < 2:
        return  # torch refuses to normalise a single value
    generator = np.random.default_rng(seed)
    x = generator.normal(3, 2, (real + padding, side, side, 4)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(4)
    theirs.running_mean += 0.5
    expected = theirs(torch.from_numpy(x[:real].transpose(0, 3, 1, 2).copy()))
    ours = BatchNorm(4, rngs=nnx.Rngs(0))
    ours.mean[...] += 0.5
    ours.train(sample_mask=jnp.asarray(np.arange(real + padding) < real, jnp.float32))
    found = np.asarray(ours(jnp.asarray(x)))[:real]
    np.testing.assert_allclose(found, expected.detach().numpy().transpose(0, 2, 3, 1), atol=2e-4)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.running_var.numpy(), rtol=1e-4)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_max_pool_and_its_gradient_are_torchs(height, width, seed):
    """Few different values, so that most windows hold ties."""
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(seed)
    x = generator.integers(-2, 3, (2, height, width, 3)).astype(np.float32)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    output = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
    cotangent = generator.normal(size=tuple(output.shape)).astype(np.float32)
    output.backward(torch.from_numpy(cotangent))
    found, pull = jax.vjp(max_pool, jnp.asarray(x))
    np.testing.assert_array_equal(found, output.detach().numpy().transpose(0, 2, 3, 1))
    (gradient,) = pull(jnp.asarray(cotangent.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_coarsely_and_keeps_float32_weights(sample_encoder):
    batch = Batch.padded(random_images(8, 64), np.arange(8, dtype=np.int32), 8)
    exact, metrics = one_step(sample_encoder, batch)
    coarse, coarse_metrics = one_step(sample_encoder, batch, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse)} == {jnp.dtype("float32")}
    assert 0 < abs(float(metrics.loss) - float(coarse_metrics.loss)) < 0.05
    for path, leaf in by_path(exact.weights()).items():
        start = by_path({"encoder": sample_encoder.params})
        if path in start:
            update = np.linalg.norm(leaf - start[path])
            error = np.linalg.norm(by_path(coarse.weights())[path] - leaf)
            assert 0 < error < 0.35 * update, path


@pytest.mark.slow
def test_statistics_move_by_a_tenth_and_get_no_gradient(sample_encoder):
    batch = Batch.padded(random_images(8, 64), np.arange(8, dtype=np.int32), 8)
    state, _ = one_step(sample_encoder, batch)
    assert len(sample_encoder.statistics) == 40
    assert all(path.endswith(("mean", "var")) for path in sample_encoder.statistics)
    moved = by_path(state.weights()["encoder"])
    # the stem's, by hand: torch's rule on the convolution's output
    start = by_path(sample_encoder.params)
    x = normalise(jnp.asarray(batch.inputs), sample_encoder.mean, sample_encoder.std)
    stem = np.asarray(conv2d(x, start["conv1/kernel"], 2))
    expected = 0.9 * start["bn1/mean"] + 0.1 * stem.mean((0, 1, 2))
    np.testing.assert_allclose(moved["bn1/mean"], expected, atol=1e-5)
    expected = 0.9 * start["bn1/var"] + 0.1 * stem.reshape(-1, 16).var(axis=0, ddof=1)
    np.testing.assert_allclose(moved["bn1/var"], expected, rtol=1e-4)
    for path in sample_encoder.statistics:
        assert not np.array_equal(moved[path], by_path(sample_encoder.params)[path]), path
        assert path not in by_path(state.trained["encoder"])


def test_heads_are_timms(timm):
    """The same bounds and deviations, measured over many draws, as those of timm's own heads."""
    import torch

    torch.manual_seed(0)
    drawn = initial_head(384, 1000, "mean", 3)
    theirs = timm.create_model("resnet18", num_classes=1000).fc
    bound = 384**-0.5
    assert np.abs(drawn["kernel"]).max() <= bound
    assert np.abs(drawn["kernel"]).max() > 0.999 * bound
    assert np.abs(drawn["bias"]).max() > 0.98 * bound
    ours, expected = drawn["kernel"].std() * 384**0.5, theirs.weight.std().item() * 512**0.5
    assert ours == pytest.approx(expected, rel=0.01)

    drawn = initial_head(384, 1000, "cls", 3)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=1000).head
    assert drawn["kernel"].std() == pytest.approx(theirs.weight.std().item(), rel=0.01)
    assert theirs.weight.abs().max().item() > 0.06  # not cut at two deviations
    assert np.abs(drawn["kernel"]).max() > 0.06
    assert not drawn["bias"].any()
    assert not theirs.bias.detach().numpy().any()
    same, other = initial_head(384, 1000, "cls", 3), initial_head(384, 1000, "cls", 4)
    np.testing.assert_array_equal(same["kernel"], drawn["kernel"])
    assert not np.array_equal(other["kernel"], drawn["kernel"])


def own_module() -> nnx.Module:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, images):
            return self.dropout(jax.nn.relu(self.norm(self.conv(images)))).mean(axis=(1, 2))

    return Net(nnx.Rngs(0))


def test_own_modules_train_with_their_batch_norm_and_dropout(small_sample, tmp_path):
    encoder = dlc.Encoder.from_module(own_module(), lambda path: path.endswith("kernel"))
    arguments = {"image_size": 32, "epochs": 2, "batch_size": 16, "learning_rate": 0.1}
    result = dlc.finetune(encoder, small_sample, folder=tmp_path, **arguments)
    again = dlc.finetune(encoder, small_sample, folder=tmp_path, **arguments)  # from disk
    np.testing.assert_array_equal(
        again.weights["encoder"]["conv"]["kernel"], result.weights["encoder"]["conv"]["kernel"]
    )
    before, after = by_path(encoder.params), by_path(result.weights["encoder"])
    for path in ("conv/kernel", "norm/scale", "norm/mean", "norm/var"):
        assert not np.array_equal(before[path], after[path]), path
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"] + 0.1


def test_own_functions_train_without_statistics(small_sample):
    weights = np.random.default_rng(0).normal(0, 0.1, (48, 16)).astype(np.float32)

    def apply(params, images):
        patches = images.reshape(len(images), 8, 4, 8, 4, 3).mean(axis=(1, 3))
        return patches.reshape(len(images), -1) @ params["w"]

    encoder = dlc.Encoder({"w": jnp.asarray(weights)}, apply, lambda path: True)
    result = dlc.finetune(
        encoder, small_sample, image_size=32, epochs=3, batch_size=16, learning_rate=0.1
    )
    assert not np.array_equal(result.weights["encoder"]["w"], weights)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_predictions_use_running_statistics(sample_encoder):
    """A sample's class does not depend on the others of its batch."""
    batch = Batch.padded(random_images(8, 64), np.arange(8, dtype=np.int32), 8)
    state, _ = one_step(sample_encoder, batch)
    network = Network.of(sample_encoder, "float32")
    together = np.asarray(predicted_classes(network, state, batch.inputs))
    alone = [int(predicted_classes(network, state, batch.inputs[i : i + 1])[0]) for i in range(8)]
    assert together.tolist() == alone
