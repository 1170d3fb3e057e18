"""ViT-S/16 and ViT-B/16 without the classifier, as timm defines them.

Source: Dosovitskiy et al. 2021, arXiv 2010.11929.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax.encoders.stored_tensors import AS_IT_IS, CONVOLUTION, LINEAR, Table

PATCH_SIZE = 16


class ViTSize(NamedTuple):
    """Token width, number of blocks and of attention heads."""

    width: int
    depth: int
    num_heads: int


SIZES = {
    "vit_small_patch16_224": ViTSize(384, 12, 6),
    "vit_base_patch16_224": ViTSize(768, 12, 12),
}


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(size.width, 3 * size.width, rngs=rngs)
        self.proj = nnx.Linear(size.width, size.width, rngs=rngs)
        self.num_heads = size.num_heads

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(mixed.reshape(batch, tokens, width))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, size: ViTSize, *, rngs: nnx.Rngs):
        self.norm1 = _layer_norm(size.width, rngs)
        self.attn = Attention(size, rngs=rngs)
        self.norm2 = _layer_norm(size.width, rngs)
        self.mlp = Mlp(size.width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Normalised images to the final, normed token sequence, class token first."""

    def __init__(self, size: ViTSize, num_patches: int = 196, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.patch_embed = nnx.Linear(3 * PATCH_SIZE**2, size.width, rngs=rngs)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, size.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, num_patches + 1, size.width)))
        self.blocks = nnx.List([Block(size, rngs=rngs) for _ in range(size.depth)])
        self.norm = _layer_norm(size.width, rngs)

    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b t d"]:
        batch, side = images.shape[:2]
        grid = side // PATCH_SIZE
        patches = images.reshape(batch, grid, PATCH_SIZE, grid, PATCH_SIZE, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, -1)
        tokens = self.patch_embed(patches)
        cls = jnp.broadcast_to(self.cls_token[...], (batch, 1, tokens.shape[-1]))
        x = jnp.concatenate([cls.astype(tokens.dtype), tokens], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# How parameters are stored; the head is not part of an encoder.
NAMES: Table = (
    (r"cls_token|pos_embed", r"\g<0>", AS_IT_IS),
    (r"patch_embed/kernel", r"patch_embed.proj.weight", CONVOLUTION),
    (r"patch_embed/bias", r"patch_embed.proj.bias", AS_IT_IS),
    (r"(blocks/\d+/(?:attn|mlp)/\w+)/kernel", r"\1.weight", LINEAR),
    (r"(.*)/(scale|bias)", r"\1.\2", AS_IT_IS),
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
