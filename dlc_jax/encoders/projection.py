"""The linear layers of a decoder's blocks, with or without a low-rank change.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dlc_jax.encoders.encoder import precision_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which projections have a low-rank change, and of what size.

    Attributes:
      rank: Rank of the change.
      alpha: The change is multiplied by alpha / rank.
      targets: Names of projections, in `TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Projection(nnx.Linear):
    """x @ kernel; of an adapter's target, plus scale * (x @ lora_a) @ lora_b.

    Args:
      name: In `TARGETS`.
      num_in, num_out: Its size.
      adapter: None: there is none.
      dtype: Type of the kernel; the adapter's matrices, and what they add, are float32.
      rngs: Source of random weights; the adapter's matrices are zeros.
    """

    def __init__(
        self,
        name: str,
        num_in: int,
        num_out: int,
        *,
        adapter: Adapter | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_in, num_out, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.lora_scale: float | None = None
        if adapter is not None and name in adapter.targets:
            self.lora_scale = adapter.scale
            self.lora_a = nnx.LoRAParam(jnp.zeros((num_in, adapter.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((adapter.rank, num_out)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = super().__call__(x)
        if self.lora_scale is None:
            return y
        with precision_of("float32"):
            change = (x.astype(jnp.float32) @ self.lora_a[...]) @ self.lora_b[...]
        return (y + change * self.lora_scale).astype(y.dtype)
