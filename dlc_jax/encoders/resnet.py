"""ResNet-18, -34 and -50 without the classifier, as torchvision and timm define them.

Source: He et al. 2016, arXiv 1512.03385; stride on the 3 x 3 convolution of a bottleneck.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax.encoders.layers import BatchNorm, Conv, max_pool
from dlc_jax.encoders.stored_tensors import AS_IT_IS, CONVOLUTION, Table


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
