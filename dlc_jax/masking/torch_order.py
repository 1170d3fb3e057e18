"""Positions of weights in torch's layout, which decide between equally small ones.

One checkpoint then has the same masks, however its tensors are laid out here. Leaves named `kernel`
are taken for Flax's, [h, w, in, out] or [in, out], of torch's [out, in, h, w] or [out, in]; all
others, those of converted networks among them, are as torch has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

_KERNEL = "kernel"
_PATCHES = "patch_embed/kernel"  # a linear layer of patches [h w 3, out]; a convolution in torch


class TorchLayout(NamedTuple):
    """How the axes of a leaf lie in torch.

    Attributes:
      shape: Shape of the leaf, with axes apart that are one here.
      axes: These axes in torch's order.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> TorchLayout:
        """Returns the layout of a leaf by its path and shape."""
        shape = tuple(shape) or (1,)
        if path == _PATCHES and len(shape) == 2:
            side = math.isqrt(shape[0] // 3)
            shape = (side, side, 3, shape[1]) if 3 * side**2 == shape[0] else shape
        is_kernel = path.rpartition("/")[2] == _KERNEL and len(shape) > 1
        first = (len(shape) - 1, len(shape) - 2) if is_kernel else ()
        return cls(shape, (*first, *range(len(shape) - len(first))))

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes)

    def in_torch(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the leaf as torch has it; a view where that is possible."""
        return leaf.reshape(self.shape).transpose(self.axes)

    def from_torch(self, values: np.ndarray, like: Any) -> np.ndarray:
        """Returns values in torch's layout in that of the leaf `like`."""
        return values.reshape(self.torch_shape).transpose(np.argsort(self.axes)).reshape(like.shape)

    def positions(self, like: Any) -> Int32[Array, ...]:
        """Returns each weight's position, row by row in torch, in the shape of the leaf `like`.

        Computed from the place of each weight: neither transposed nor kept, whoever holds the leaf.
        """
        found, stride = jnp.zeros(self.shape, jnp.int32), 1
        for axis in reversed(self.axes):
            found = found + stride * jax.lax.broadcasted_iota(jnp.int32, self.shape, axis)
            stride *= self.shape[axis]
        return found.reshape(like.shape)
