"""ConvNeXt and ConvNeXt V2 without the classifier, as timm defines them.

Sources: Liu et al. 2022, arXiv 2201.03545; Woo et al. 2023, arXiv 2301.00808.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax.encoders.stored_tensors import AS_IT_IS, CONVOLUTION, LINEAR, Table
from dlc_jax.encoders.vit import layer_norm, patches

# Batches of feature maps, and kernels of one filter per channel.
Maps = Float[Array, "b h w i"]
DepthwiseKernel = Float[Array, "k k 1 i"]


class ConvNeXtSize(NamedTuple):
    """Blocks and channels of the stages.

    Attributes:
      normalises_responses: Whether it is V2: responses are normalised in the middle of every block,
        and no layer scale is at its end.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    normalises_responses: bool = False


_DEPTHS = {
    **dict.fromkeys(("atto", "femto", "pico"), (2, 2, 6, 2)),
    "nano": (2, 2, 8, 2),
    "tiny": (3, 3, 9, 3),
    **dict.fromkeys(("small", "base", "large", "xlarge", "huge"), (3, 3, 27, 3)),
}
_WIDTHS = {"atto": 40, "femto": 48, "pico": 64, "nano": 80, "tiny": 96, "small": 96, "base": 128}
_WIDTHS |= {"large": 192, "xlarge": 256, "huge": 352}  # of the first stage; doubled by each


def _size(name: str, is_v2: bool) -> ConvNeXtSize:
    widths = tuple(_WIDTHS[name] * 2**stage for stage in range(4))
    return ConvNeXtSize(_DEPTHS[name], widths, is_v2)


SIZES = {f"convnext_{name}": _size(name, False) for name in _WIDTHS if name != "huge"}
SIZES |= {f"convnextv2_{name}": _size(name, True) for name in _WIDTHS if name != "xlarge"}


def depthwise(x: Maps, kernel: DepthwiseKernel) -> Maps:
    """Convolves every channel with its own filter; stride 1, padding k // 2 on every side."""
    form = depthwise_shifted if jax.default_backend() == "cpu" else depthwise_xla
    return form(x, kernel)


def depthwise_xla(x: Maps, kernel: DepthwiseKernel) -> Maps:
    """`depthwise` as one convolution of as many groups as channels."""
    padding = [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


# XLA's convolution of that many groups takes 25 to 40 times longer on CPU, and derivatives of
# slices 10 to 30 times longer than those below (docs/log/speed.md).
@jax.custom_vjp
def depthwise_shifted(x: Maps, kernel: DepthwiseKernel) -> Maps:
    """`depthwise` as a sum of shifted products, float32 inside."""
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    padded, taps = _padded(x, size), kernel.astype(jnp.float32)
    total = jnp.zeros(x.shape, jnp.float32)
    for i in range(size):
        for j in range(size):
            total = total + padded[:, i : i + height, j : j + width] * taps[i, j, 0]
    return total.astype(x.dtype)


def _padded(x: Maps, size: int) -> Float[Array, "b oh ow i"]:
    pad = size // 2
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _forward(x: Maps, kernel: DepthwiseKernel) -> tuple[Maps, tuple[Maps, DepthwiseKernel]]:
    return depthwise_shifted(x, kernel), (x, kernel)


def _backward(saved: tuple[Maps, DepthwiseKernel], gradient: Maps) -> tuple[Maps, DepthwiseKernel]:
    """Returns gradients of map and kernel.

    That of the kernel is a sum over positions of the window around each times the gradient there,
    row by row, which keeps all k x k x i sums at hand.
    """
    x, kernel = saved
    size, (num, height, width, channels) = kernel.shape[0], x.shape
    padded, outer = _padded(x, size), gradient.astype(jnp.float32)

    def add_row(row: Array, total: Float[Array, "k k i"]) -> Float[Array, "k k i"]:
        image, top = row // height, row % height

        def add_position(left: Array, partial: Float[Array, "k k i"]) -> Float[Array, "k k i"]:
            where = (image, top, left, 0)
            window = jax.lax.dynamic_slice(padded, where, (1, size, size, channels))[0]
            return partial + window * jax.lax.dynamic_slice(outer, where, (1, 1, 1, channels))[0]

        return total + jax.lax.fori_loop(0, width, add_position, jnp.zeros_like(total))

    zeros = jnp.zeros((size, size, channels), jnp.float32)
    of_kernel = jax.lax.fori_loop(0, num * height, add_row, zeros)[:, :, None]
    return depthwise_shifted(gradient, kernel[::-1, ::-1]), of_kernel.astype(kernel.dtype)


depthwise_shifted.defvjp(_forward, _backward)


class DepthwiseConv(nnx.Module):
    """`depthwise` with a bias; kernel [7, 7, 1, i]."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (7, 7, 1, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Maps) -> Maps:
        return depthwise(x, self.kernel[...]) + self.bias[...]


class PatchConv(nnx.Module):
    """Convolution of patches side by side, as a matmul; what is left at the edges is cut off."""

    def __init__(self, num_in: int, num_out: int, size: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, num_in, num_out)))
        self.bias = nnx.Param(jnp.zeros(num_out))

    def __call__(self, x: Maps) -> Float[Array, "b oh ow o"]:
        size, _, _, num_out = self.kernel.shape
        return patches(x, size) @ self.kernel[...].reshape(-1, num_out) + self.bias[...]


class ResponseNorm(nnx.Module):
    """Global response normalisation: channels scaled by their share of a map's norm."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Maps) -> Maps:
        squares = jnp.square(x.astype(jnp.float32)).sum((1, 2), keepdims=True)
        # the root's derivative at 0 is infinite; torch's norm has derivative 0 there
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        share = (norms / (norms.mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return x + (self.bias[...] + self.scale[...] * (x * share))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU, and V2's normalisation, between."""

    def __init__(self, width: int, normalises_responses: bool, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.grn = ResponseNorm(4 * width) if normalises_responses else None
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Maps) -> Maps:
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(x if self.grn is None else self.grn(x))


class Block(nnx.Module):
    """A depthwise convolution and an MLP on a residual path."""

    def __init__(self, width: int, normalises_responses: bool, *, rngs: nnx.Rngs):
        self.conv_dw = DepthwiseConv(width, rngs=rngs)
        self.norm = layer_norm(width, rngs)
        self.mlp = Mlp(width, normalises_responses, rngs=rngs)
        self.gamma = None if normalises_responses else nnx.Param(jnp.ones(width))

    def __call__(self, x: Maps) -> Maps:
        moved = self.mlp(self.norm(self.conv_dw(x)))
        return x + (moved if self.gamma is None else moved * self.gamma[...])


class Stage(nnx.Module):
    """Blocks at one resolution; all but the first stage halve it before."""

    def __init__(self, before: int, width: int, depth: int, is_v2: bool, *, rngs: nnx.Rngs):
        self.halves = before != width
        if self.halves:
            conv = PatchConv(before, width, 2, rngs=rngs)
            self.downsample = nnx.List([layer_norm(before, rngs), conv])
        self.blocks = nnx.List([Block(width, is_v2, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        for layer in (*(self.downsample if self.halves else ()), *self.blocks):
            x = layer(x)
        return x


class ConvNeXt(nnx.Module):
    """Normalised images to what the classifier reads: the mean of the last map, normed."""

    def __init__(self, size: ConvNeXtSize, *, rngs: nnx.Rngs):
        first, last = size.widths[0], size.widths[-1]
        self.stem = nnx.List([PatchConv(3, first, 4, rngs=rngs), layer_norm(first, rngs)])
        stages = zip((first, *size.widths), size.widths, size.depths, strict=False)
        self.stages = nnx.List(
            [Stage(*stage, size.normalises_responses, rngs=rngs) for stage in stages]
        )
        self.norm = layer_norm(last, rngs)

    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        x = images
        for layer in (*self.stem, *self.stages):
            x = layer(x)
        return self.norm(x.astype(jnp.float32).mean((1, 2)))


# How parameters are stored; the head is not part of an encoder, but its norm is.
NAMES: Table = (
    (r"(.*/mlp/fc\d)/kernel", r"\1.weight", LINEAR),
    (r"(.*)/kernel", r"\1.weight", CONVOLUTION),
    (r"norm/(scale|bias)", r"head.norm.\1", AS_IT_IS),
    (r".*", r"\g<0>", AS_IT_IS),
)
IGNORED = (r"head\.fc\.(weight|bias)",)


def module_order(path: str) -> tuple[int, int, int]:
    """Sort key of prunable paths: torch's order of modules, where a stage begins with halving."""
    _, stage, *inside = path.split("/")
    if inside[0] == "downsample":
        return int(stage), -1, 0
    _, block, *_, layer, _ = inside
    return int(stage), int(block), ("conv_dw", "fc1", "fc2").index(layer)


def is_prunable(path: str) -> bool:
    """Every convolution and linear layer of the stages; not the stem."""
    return path.startswith("stages/") and path.endswith("kernel")
