"""Vision transformers without the classifier, as timm defines them: ViT, DINOv2, CLIP and SigLIP.

Sources: Dosovitskiy et al. 2021, arXiv 2010.11929; Oquab et al. 2023, arXiv 2304.07193; Darcet et
al. 2023, arXiv 2309.16588 (registers); Radford et al. 2021, arXiv 2103.00020; Zhai et al. 2023,
arXiv 2303.15343.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax import expect
from dlc_jax.encoders.stored_tensors import AS_IT_IS, CONVOLUTION, LINEAR, Table, Tensors
from dlc_jax.types import Params

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
Tokens = Float[Array, "b t d"]


class ViTSize(NamedTuple):
    """What tells the architectures apart.

    Attributes:
      width: Of tokens.
      depth: Blocks.
      num_heads: Attention heads.
      patch: Side of a patch in pixels.
      hidden: Width between an MLP's two layers; None: four times that of tokens.
      activation: A key of `ACTIVATIONS`.
      epsilon: Of layer norms.
      class_token: Whether there is one.
      registers: Tokens behind it that carry nothing of an image.
      only_patches_placed: Whether class token and registers have no position embedding.
      norm_before: Whether tokens are normed before the blocks; patches are embedded without bias.
      layer_scale: Whether what attention and MLP add is scaled by channel.
      norms_queries: Whether queries and keys are normed in every head.
      attention_pool: Whether the classifier reads a pooling by attention, not the class token.
      normalisation: timm's mean and deviation of RGB.
    """

    width: int
    depth: int
    num_heads: int
    patch: int = 16
    hidden: int | None = None
    activation: str = "gelu"
    epsilon: float = 1e-6
    class_token: bool = True
    registers: int = 0
    only_patches_placed: bool = False
    norm_before: bool = False
    layer_scale: bool = False
    norms_queries: bool = False
    attention_pool: bool = False
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = _HALF

    @property
    def num_placed(self) -> int:
        """How many tokens before the patches have a position embedding."""
        return 0 if self.only_patches_placed else self.class_token + self.registers


_S, _B, _L, _H = (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16)
_SO400M = (1152, 27, 16)
_dinov2 = functools.partial(ViTSize, patch=14, layer_scale=True, normalisation=_IMAGENET)
_clip = functools.partial(ViTSize, norm_before=True, epsilon=1e-5, normalisation=_CLIP)
_siglip = functools.partial(ViTSize, class_token=False, attention_pool=True)

_DINOV2 = {
    "small": _dinov2(*_S),
    "base": _dinov2(*_B),
    "large": _dinov2(*_L),
    "giant": _dinov2(1536, 40, 24, hidden=8192, activation="swiglu"),
}
SIZES = {
    "vit_tiny_patch16_224": ViTSize(192, 12, 3),
    "vit_small_patch16_224": ViTSize(*_S),
    "vit_base_patch16_224": ViTSize(*_B),
    "vit_base_patch32_224": ViTSize(*_B, patch=32),
    "vit_large_patch16_224": ViTSize(*_L),
    **{f"vit_{name}_patch14_dinov2": size for name, size in _DINOV2.items()},
    **{
        f"vit_{name}_patch14_reg4_dinov2": size._replace(registers=4, only_patches_placed=True)
        for name, size in _DINOV2.items()
    },
    "vit_base_patch32_clip_224": _clip(*_B, patch=32),
    "vit_base_patch16_clip_224": _clip(*_B),
    "vit_large_patch14_clip_224": _clip(*_L, patch=14, normalisation=_HALF),
    "vit_huge_patch14_clip_224": _clip(*_H, patch=14),
    "vit_base_patch32_clip_quickgelu_224": _clip(*_B, patch=32, activation="quick_gelu"),
    "vit_base_patch16_clip_quickgelu_224": _clip(*_B, activation="quick_gelu"),
    "vit_large_patch14_clip_quickgelu_224": _clip(*_L, patch=14, activation="quick_gelu"),
    "vit_base_patch32_siglip_256": _siglip(*_B, patch=32, activation="gelu_tanh"),
    **{f"vit_base_patch16_siglip_{pixels}": _siglip(*_B) for pixels in (224, 256, 384, 512)},
    **{f"vit_large_patch16_siglip_{pixels}": _siglip(*_L) for pixels in (256, 384)},
    "vit_so400m_patch14_siglip_224": _siglip(*_SO400M, patch=14, hidden=4304),
    "vit_so400m_patch14_siglip_378": _siglip(*_SO400M, patch=14, hidden=4304),
    "vit_so400m_patch16_siglip_256": _siglip(*_SO400M, hidden=4304, activation="gelu_tanh"),
}


def _swiglu(x: Float[Array, "*b h"]) -> Float[Array, "*b g"]:
    """Returns the second half, gated by the first."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


# timm's names; what the second layer of an MLP takes of the first one's outputs
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "swiglu": _swiglu,
}


def layer_norm(width: int, rngs: nnx.Rngs, epsilon: float = 1e-6) -> nnx.LayerNorm:
    """Layer norm as torch computes it."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def patches(images: Float[Array, "b h w i"], size: int) -> Float[Array, "b oh ow o"]:
    """Returns the pixels of every patch in a row; what is left at the edges is cut off."""
    batch, high, wide = (images.shape[0], images.shape[1] // size, images.shape[2] // size)
    images = images[:, : high * size, : wide * size]
    found = images.reshape(batch, high, size, wide, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return found.reshape(batch, high, wide, -1)


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(size.width, 3 * size.width, rngs=rngs)
        self.proj = nnx.Linear(size.width, size.width, rngs=rngs)
        self.num_heads = size.num_heads
        self.norms_queries = size.norms_queries
        if size.norms_queries:
            of_head = size.width // size.num_heads
            self.q_norm = layer_norm(of_head, rngs, size.epsilon)
            self.k_norm = layer_norm(of_head, rngs, size.epsilon)

    def __call__(self, x: Tokens) -> Tokens:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        queries, keys = qkv[:, :, 0], qkv[:, :, 1]
        if self.norms_queries:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        mixed = jax.nn.dot_product_attention(queries, keys, qkv[:, :, 2])
        return self.proj(mixed.reshape(batch, tokens, width))


class AttentionPool(nnx.Module):
    """One vector from all tokens: attention of a learnt query to them, and an MLP on it."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        self.latent = nnx.Param(jnp.zeros((1, 1, size.width)))
        self.q = nnx.Linear(size.width, size.width, rngs=rngs)
        self.kv = nnx.Linear(size.width, 2 * size.width, rngs=rngs)
        self.proj = nnx.Linear(size.width, size.width, rngs=rngs)
        self.norm = layer_norm(size.width, rngs, size.epsilon)
        self.mlp = Mlp(size, rngs=rngs)
        self.num_heads = size.num_heads

    def __call__(self, x: Tokens) -> Float[Array, "b d"]:
        batch, tokens, width = x.shape
        heads = (self.num_heads, width // self.num_heads)
        query = jnp.broadcast_to(self.q(self.latent[...]).reshape(1, 1, *heads), (batch, 1, *heads))
        kv = self.kv(x).reshape(batch, tokens, 2, *heads)
        mixed = jax.nn.dot_product_attention(query, kv[:, :, 0], kv[:, :, 1])
        pooled = self.proj(mixed.reshape(batch, width))
        return pooled + self.mlp(self.norm(pooled))


class Mlp(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        hidden = size.hidden or 4 * size.width
        left = hidden // 2 if size.activation == "swiglu" else hidden
        self.fc1 = nnx.Linear(size.width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(left, size.width, rngs=rngs)
        self.activation = size.activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class LayerScale(nnx.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: Tokens) -> Tokens:
        return x * self.gamma[...]


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(size.width, rngs, size.epsilon)
        self.attn = Attention(size, rngs=rngs)
        self.norm2 = layer_norm(size.width, rngs, size.epsilon)
        self.mlp = Mlp(size, rngs=rngs)
        self.layer_scale = size.layer_scale
        if size.layer_scale:
            self.ls1, self.ls2 = LayerScale(size.width), LayerScale(size.width)

    def __call__(self, x: Tokens) -> Tokens:
        added = self.attn(self.norm1(x))
        x = x + (self.ls1(added) if self.layer_scale else added)
        added = self.mlp(self.norm2(x))
        return x + (self.ls2(added) if self.layer_scale else added)


class ViT(nnx.Module):
    """Normalised images to the final, normed token sequence: class token, registers, patches."""

    def __init__(self, size: ViTSize, num_patches: int = 196, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)

        def learnt(num_tokens: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (1, num_tokens, size.width)))

        num_in = 3 * size.patch**2
        self.patch_embed = nnx.Linear(num_in, size.width, use_bias=not size.norm_before, rngs=rngs)
        if size.class_token:
            self.cls_token = learnt(1)
        if size.registers:
            self.reg_token = learnt(size.registers)
        self.pos_embed = learnt(size.num_placed + num_patches)
        if size.norm_before:
            self.norm_pre = layer_norm(size.width, rngs, size.epsilon)
        self.blocks = nnx.List([Block(size, rngs=rngs) for _ in range(size.depth)])
        self.norm = layer_norm(size.width, rngs, size.epsilon)
        if size.attention_pool:
            self.attn_pool = AttentionPool(size, rngs=rngs)
        self.size = size

    def __call__(
        self, images: Float[Array, "b s s 3"], pooled: bool = False
    ) -> Tokens | Float[Array, "b d"]:
        """Returns tokens; `pooled`: what the attention pool makes of them."""
        size = self.size
        pixels = patches(images, size.patch)
        x = self.patch_embed(pixels.reshape(len(pixels), -1, pixels.shape[-1]))
        if size.only_patches_placed:
            x = self._with_others(x + self.pos_embed[...])
        else:
            x = self._with_others(x) + self.pos_embed[...]
        if size.norm_before:
            x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.attn_pool(x) if pooled else x

    def _with_others(self, x: Tokens) -> Float[Array, "b u d"]:
        """Puts class token and registers before the patches."""
        has = (("cls_token", self.size.class_token), ("reg_token", self.size.registers))
        others = [getattr(self, name)[...] for name, is_there in has if is_there]
        if not others:
            return x
        shown = [jnp.broadcast_to(some, (len(x), *some.shape[1:])) for some in others]
        return jnp.concatenate([*(some.astype(x.dtype) for some in shown), x], axis=1)


def grid_of(size: ViTSize, tensors: Tensors) -> int:
    """Returns how many patches a side has in a checkpoint's positions; as of 224 px without any."""
    shape = tensors["pos_embed"].shape if "pos_embed" in tensors else ()
    num_patches = shape[1] - size.num_placed if len(shape) == 3 else 0
    grid = math.isqrt(max(num_patches, 0))
    return grid if grid and grid**2 == num_patches else 224 // size.patch


def resized(size: ViTSize, params: Params, image_size: int) -> Params:
    """Returns the parameters for images of another size.

    Raises:
      ValueError: a size that is no multiple of a patch's side.
    """
    if image_size % size.patch:
        raise expect.InputError(
            f"encoder.image_size: patches of {size.patch} px do not fill {image_size} px; expected "
            f"a multiple, such as {max(1, round(image_size / size.patch)) * size.patch}."
        )
    positions = np.asarray(params["pos_embed"])
    positions = resampled(positions, size.num_placed, image_size // size.patch)
    return {**params, "pos_embed": jnp.asarray(positions)}


def resampled(
    positions: Float[np.ndarray, "1 t d"], num_placed: int, grid: int
) -> Float[np.ndarray, "1 u d"]:
    """Resamples position embeddings to another number of patches, as timm does.

    Args:
      positions: Those of `num_placed` other tokens, which stay, and of a square of patches.
      num_placed: See `ViTSize`.
      grid: Patches on a side of the new square.
    """
    others, patch_positions = np.split(positions, [num_placed], axis=1)
    side = math.isqrt(patch_positions.shape[1])
    square = patch_positions.astype(np.float64).reshape(side, side, -1)
    for _ in range(2):  # columns, then rows
        square = _bicubic(square, grid).transpose(1, 0, 2)
    found = square.astype(positions.dtype).reshape(1, grid * grid, -1)
    return np.concatenate([others, found], axis=1)


def _bicubic(values: Float[np.ndarray, "i j d"], length: int) -> Float[np.ndarray, "k j d"]:
    """Resamples the first axis as torch does with `antialias=True` (cubic of a = -0.5).

    Taps are added one by one, so that every machine gets the same bits.
    """
    num = len(values)
    ratio = num / length
    widening = max(ratio, 1.0)  # of the cubic, where there are fewer points than before
    centres = (np.arange(length) + 0.5) * ratio
    first = np.maximum((centres - 2 * widening + 0.5).astype(int), 0)
    last = np.minimum((centres + 2 * widening + 0.5).astype(int), num)
    taps = first[:, None] + np.arange((last - first).max())
    x = np.abs((taps - centres[:, None] + 0.5) / widening)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    total = np.zeros((length, *values.shape[1:]))
    for weight, tap in zip(weights.T, np.minimum(taps, num - 1).T, strict=True):
        total += weight[:, None, None] * values[tap]
    return total


# How parameters are stored; the head is not part of an encoder.
NAMES: Table = (
    (r"patch_embed/kernel", r"patch_embed.proj.weight", CONVOLUTION),
    (r"patch_embed/bias", r"patch_embed.proj.bias", AS_IT_IS),
    (r"(.*)/kernel", r"\1.weight", LINEAR),
    (r".*", r"\g<0>", AS_IT_IS),
)
IGNORED = (r"head\.(weight|bias)",)


def module_order(path: str) -> tuple[int, int]:
    """Sort key of prunable paths: torch's order of modules, where qkv comes before proj."""
    if not path.startswith("blocks/"):
        return -1, 0  # the patch embedding
    _, block, _, layer, _ = path.split("/")
    return int(block), ("qkv", "proj", "fc1", "fc2").index(layer)


def is_prunable(path: str) -> bool:
    """Every linear layer of the blocks; not the patch embedding."""
    return path.startswith("blocks/") and path.endswith("kernel")
