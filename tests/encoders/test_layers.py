import functools

import jax
import numpy as np
import pytest

from dlc_jax.encoders.convnext import ResponseNorm, depthwise
from dlc_jax.encoders.resnet import conv2d, max_pool


@pytest.mark.parametrize("backend_form", ["matmul where faster", "convolution"])
@pytest.mark.parametrize(
    ("side", "size", "stride"),
    [(64, 7, 2), (16, 3, 1), (15, 3, 2), (8, 3, 2), (4, 3, 1), (2, 3, 1), (1, 3, 1), (8, 1, 2)],
)
def test_convolution_is_torchs(monkeypatch, backend_form, side, size, stride):
    import torch

    if backend_form == "convolution":  # what other backends than CPU run
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, side, side, 5)).astype(np.float32)
    kernel = generator.normal(size=(size, size, 5, 6)).astype(np.float32)
    ours = conv2d(jax.numpy.asarray(x), jax.numpy.asarray(kernel), stride)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1)),
        stride=stride,
        padding=size // 2,
    )
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_max_pool_is_torchs(side):
    import torch

    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    theirs = torch.nn.functional.max_pool2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)), 3, stride=2, padding=1
    )
    ours = max_pool(jax.numpy.asarray(x))
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("backend_form", ["shifted", "convolution"])
@pytest.mark.parametrize("over", [jax.vmap, lambda f: functools.partial(jax.lax.map, f)])
def test_depthwise_convolution_is_torchs(monkeypatch, backend_form, over):
    """Values and gradients, for two kernels side by side and one after the other."""
    import torch

    if backend_form == "convolution":  # what other backends than CPU run
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 9, 11, 5)).astype(np.float32)
    kernels = generator.normal(size=(2, 7, 7, 1, 5)).astype(np.float32)
    weights = generator.normal(size=x.shape).astype(np.float32)

    def of_kernel(kernel):
        def total(x, kernel):
            output = depthwise(x, kernel)
            return (output * weights).sum(), output

        inputs = (jax.numpy.asarray(x), kernel)
        return jax.grad(total, argnums=(0, 1), has_aux=True)(*inputs)

    (of_x, of_k), outputs = jax.jit(over(of_kernel))(jax.numpy.asarray(kernels))
    for k, kernel in enumerate(kernels):
        there = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).requires_grad_()
        theirs = torch.nn.functional.conv2d(there, weight, padding=3, groups=5)
        (theirs * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
        pairs = [
            (outputs[k], theirs.detach().numpy().transpose(0, 2, 3, 1)),
            (of_x[k], there.grad.numpy().transpose(0, 2, 3, 1)),
            (of_k[k], weight.grad.numpy().transpose(2, 3, 1, 0)),
        ]
        for ours, expected in pairs:
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_depthwise_convolution_of_half_precision_adds_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 3), "bfloat16")
    kernel = jax.random.normal(jax.random.key(1), (7, 7, 1, 3), "bfloat16")
    half = jax.jit(depthwise)(x, kernel)
    whole = jax.jit(depthwise)(x.astype("float32"), kernel.astype("float32"))
    assert half.dtype == "bfloat16"
    np.testing.assert_array_equal(half, whole.astype("bfloat16"))


def test_response_norm_of_channels_that_are_zero():
    """Its gradient is torch's 0 there, not NaN."""
    norm = ResponseNorm(2)
    norm.scale[...] = jax.numpy.ones(2)
    x = jax.numpy.zeros((1, 2, 2, 2)).at[..., 0].set(3)
    gradient = jax.grad(lambda x: norm(x).sum())(x)
    assert np.isfinite(gradient).all()
    # x + x * share: the share of a channel is its norm 6 by the mean of 6 and 0
    np.testing.assert_allclose(norm(x)[..., 0], 3 + 3 * 6 / (3 + 1e-6), rtol=1e-6)
