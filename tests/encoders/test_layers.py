import jax
import numpy as np
import pytest

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
