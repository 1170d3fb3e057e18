"""ResNet-18, -34 and -50 without the classifier, as torchvision and timm define them.

Source: He et al. 2016, arXiv 1512.03385; stride on the 3 x 3 convolution of a bottleneck.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax.encoders.stored_tensors import AS_IT_IS, CONVOLUTION, Table

# Batches of feature maps before and after a layer, and kernels.
Maps = Float[Array, "b h w i"]
NewMaps = Float[Array, "b oh ow o"]
Kernel = Float[Array, "k k i o"]
# Up to this many output positions (4 x 4) XLA's CPU convolution loses to one matmul over gathered
# patches, at 2 x 2 by a factor of 98 (docs/log/parity.md).
_MAX_MATMUL_POSITIONS = 16


class Conv(nnx.Module):
    """Bias-free convolution with symmetric padding; kernel [h, w, in, out]."""

    def __init__(self, num_in: int, num_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, num_in, num_out)))
        self.stride = stride

    def __call__(self, x: Maps) -> NewMaps:
        return conv2d(x, self.kernel[...], self.stride)


def conv2d(x: Maps, kernel: Kernel, stride: int) -> NewMaps:
    """Convolves with padding k // 2 on every side, as the convolutions of a ResNet do.

    On CPU, 1 x 1 kernels and small outputs run as matmuls, same sums in another order.
    """
    positions = _num_out(x.shape[1], stride) * _num_out(x.shape[2], stride)
    small = kernel.shape[0] == 1 or positions <= _MAX_MATMUL_POSITIONS
    form = conv2d_matmul if jax.default_backend() == "cpu" and small else conv2d_xla
    return form(x, kernel, stride)


def conv2d_xla(x: Maps, kernel: Kernel, stride: int) -> NewMaps:
    """`conv2d` as one convolution."""
    padding = [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv2d_matmul(x: Maps, kernel: Kernel, stride: int) -> NewMaps:
    """`conv2d` as gathered patches times a matrix."""
    size, _, _, out_features = kernel.shape
    pad = size // 2
    reach_h, reach_w = ((_num_out(length, stride) - 1) * stride + 1 for length in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    patches = [
        x[:, i : i + reach_h : stride, j : j + reach_w : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, out_features)


def _num_out(length: int, stride: int) -> int:
    return -(-length // stride)


def max_pool(x: Maps) -> Float[Array, "b oh ow i"]:
    """3 x 3 maximum, stride 2, padding 1.

    As maxima of shifted slices: XLA's windowed maximum takes fourteen times longer to differentiate
    on CPU (docs/log/fine-tuning.md). Among equals the gradient goes to the first in
    row order, as in torch.
    """
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    return _max_of_three(_max_of_three(x, axis=2), axis=1)


def _max_of_three(x: Maps, axis: int) -> Float[Array, "b oh ow i"]:
    reach = x.shape[axis] - 2
    first, second, third = (
        jax.lax.slice_in_dim(x, start, start + reach, stride=2, axis=axis) for start in range(3)
    )
    return _larger(_larger(first, second), third)


def _larger(first: Maps, second: Maps) -> Maps:
    return jnp.where((second > first) | jnp.isnan(second), second, first)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation as torch trains it, over the real samples of a padded batch.

    In training mode each of the b h w values of a real sample counts once; the running variance
    takes the unbiased variance of the batch, which `nnx.BatchNorm` does not.

    Attributes:
      sample_mask: [b] 1 for samples, 0 for padding; None where all are real.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.sample_mask = nnx.data(None)

    def __call__(self, x: Maps, **_) -> Maps:
        if self.use_running_average:
            return super().__call__(x).astype(x.dtype)  # statistics stay float32
        values = x.astype(jnp.float32)
        mask = jnp.ones(len(x)) if self.sample_mask is None else self.sample_mask
        weights = mask[:, None, None, None]
        count = mask.sum() * x.shape[1] * x.shape[2]
        mean = (values * weights).sum((0, 1, 2)) / count
        var = (jnp.square(values - mean) * weights).sum((0, 1, 2)) / count
        self._move(self.mean, mean)
        self._move(self.var, var * count / jnp.maximum(count - 1, 1))
        scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...].astype(jnp.float32)
        return ((values - mean) * scale + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _move(self, running: nnx.BatchStat, new: Float[Array, " i"]) -> None:
        new = jax.lax.stop_gradient(new)
        running[...] = self.momentum * running[...] + (1 - self.momentum) * new


class ResNetSize(NamedTuple):
    """Blocks per stage, and whether blocks are bottlenecks (1-3-1, four times wider outside)."""

    depths: tuple[int, ...]
    bottleneck: bool


SIZES = {
    "resnet18": ResNetSize((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetSize((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetSize((3, 4, 6, 3), bottleneck=True),
}


class ResidualBlock(nnx.Module):
    """A residual block; `widths` are (in, inner, out)."""

    def __init__(
        self, widths: tuple[int, int, int], stride: int, bottleneck: bool, *, rngs: nnx.Rngs
    ):
        before, inner, after = widths
        if bottleneck:
            self.conv1 = Conv(before, inner, 1, rngs=rngs)
            self.conv2 = Conv(inner, inner, 3, stride, rngs=rngs)
            self.conv3 = Conv(inner, after, 1, rngs=rngs)
            self.bn3 = BatchNorm(after, rngs=rngs)
        else:
            self.conv1 = Conv(before, inner, 3, stride, rngs=rngs)
            self.conv2 = Conv(inner, after, 3, rngs=rngs)
        self.bn1 = BatchNorm(inner, rngs=rngs)
        self.bn2 = BatchNorm(inner, rngs=rngs)
        self.bottleneck = bottleneck
        self.reshapes = stride != 1 or before != after
        if self.reshapes:  # a 1 x 1 convolution on the shortcut
            conv, norm = Conv(before, after, 1, stride, rngs=rngs), BatchNorm(after, rngs=rngs)
            self.downsample = nnx.Dict(conv=conv, bn=norm)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        shortcut = self.downsample["bn"](self.downsample["conv"](x)) if self.reshapes else x
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(jax.nn.relu(x)))
        return jax.nn.relu(x + shortcut)


class ResNet(nnx.Module):
    """Normalised images to the last feature map; any width, any input size."""

    def __init__(self, size: ResNetSize, width: int = 64, *, rngs: nnx.Rngs):
        self.conv1 = Conv(3, width, 7, 2, rngs=rngs)
        self.bn1 = BatchNorm(width, rngs=rngs)
        before = width
        for stage, depth in enumerate(size.depths):
            inner = width * 2**stage
            after = inner * (4 if size.bottleneck else 1)
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                widths = (before, inner, after)
                blocks.append(ResidualBlock(widths, stride, size.bottleneck, rngs=rngs))
                before = after
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.num_stages = len(size.depths)

    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b h w d"]:
        x = max_pool(jax.nn.relu(self.bn1(self.conv1(images))))
        for stage in range(self.num_stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return x


# How parameters are stored; the head is not part of an encoder.
NAMES: Table = (
    (r"(.*)/downsample/conv/kernel", r"\1.downsample.0.weight", CONVOLUTION),
    (r"(.*)/downsample/bn/(\w+)", r"\1.downsample.1.\2", AS_IT_IS),
    (r"(.*conv\d)/kernel", r"\1.weight", CONVOLUTION),
    (r"(.*bn\d)/(\w+)", r"\1.\2", AS_IT_IS),
)
IGNORED = (r"fc\.(weight|bias)", r".*\.num_batches_tracked")


def is_prunable(path: str) -> bool:
    """Every convolution kernel, stem and down-sampling included."""
    return path.endswith("kernel")
