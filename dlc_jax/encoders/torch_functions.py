"""Functions of torch that have a rule of our own while a converted network runs; see `mode_class`.

All others are torchax's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dlc_jax import expect
from dlc_jax.encoders.convnext import depthwise


def optional(name: str, what: str) -> ModuleType:
    """Imports a library that converted networks need.

    Raises:
      ValueError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise expect.InputError(
            f"{what}: needs {name} ({expect.first_line(error)}); install what converts networks of "
            "torch with: pip install 'dlc_jax[any]'."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from logging warnings while they load a network."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _DrawError(Exception):
    """torchax was about to draw random numbers from its own key."""


def refuse_to_draw(*_: Any) -> None:
    raise _DrawError


@functools.cache
def mode_class() -> type:
    """Returns the class of the mode that sees every call of a torch function in a network."""
    torch = optional("torch", "encoder.name")
    functional = torch.nn.functional
    array_class = optional("torchax", "encoder.name").tensor.Tensor
    products = {
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
        torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm, torch.einsum,
    }  # fmt: skip
    attention = {
        functional.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
    }
    random = {
        torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like,
        torch.randint_like, torch.randperm, torch.bernoulli, torch.multinomial, torch.normal,
        torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.uniform_,
        torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.exponential_,
        torch.Tensor.multinomial,
    }  # fmt: skip

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined]
        """Batch norms by our own rule, random numbers from a key or refused, attention noticed."""

        def __init__(
            self,
            env: Any,
            what: str,
            names: dict[int, str],
            real: Array | None,
            key: Array | None,
        ):
            super().__init__()
            self.env, self.what, self.names, self.real, self.key = env, what, names, real, key
            self.moved: dict[str, Array] = {}
            self.mixes_positions = False
            self.drawn: set[str] = set()

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = kwargs or {}
            if function is functional.batch_norm:
                return self.batch_norm(*args, **kwargs)
            if function is functional.linear:  # torchax has other names for its arguments
                names = ("input", "weight", "bias")[len(args) :]
                return function(*args, *(kwargs.get(name) for name in names))
            if function is functional.interpolate and kwargs.get("antialias"):
                return self.antialiased(*args, **kwargs)
            if function is functional.conv2d:
                output = _convolved(*args, **kwargs)
                return function(*args, **kwargs) if output is None else self.env.j2t_iso(output)
            if function is functional.fold:
                return self.env.j2t_iso(_fold(*args, **kwargs))
            if self.key is not None and function in drawn_from_key:
                return self.env.j2t_iso(drawn_from_key[function](self, *args, **kwargs))
            if function in random:
                raise self.refusal(function)
            if function in attention or (function in products and self.are_activations(args)):
                self.mixes_positions = True
            args, kwargs = self.joined((args, kwargs))
            try:
                return function(*args, **kwargs)
            except _DrawError as error:
                raise self.refusal(function) from error

        def joined(self, arguments: Any) -> Any:
            """Makes tensors that torch made by itself, such as positions, arrays as the others."""
            leaves, tree = jax.tree.flatten(arguments)
            if not any(isinstance(leaf, array_class) for leaf in leaves):
                return arguments
            for place, leaf in enumerate(leaves):
                if type(leaf) is torch.Tensor and leaf.ndim:  # scalars are numbers to torchax
                    leaves[place] = self.env.to_xla(leaf)
            return jax.tree.unflatten(tree, leaves)

        def refusal(self, function: Any) -> expect.InputError:
            where = "in evaluation mode, so that its features are no function of image and weights"
            if self.key is not None:
                known = sorted(one.__name__ for one in drawn_from_key)
                where = f"in training, expected {', '.join(known)} only"
            return expect.InputError(
                f"{self.what}: draws random numbers ({function.__name__}) {where}."
            )

        def are_activations(self, args: Any) -> bool:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            return len(tensors) > 1 and all(
                tensor.ndim > 2 and id(tensor) not in self.names for tensor in tensors
            )

        def next_key(self, what: str) -> Array:
            self.drawn.add(what)
            assert self.key is not None
            self.key, key = jax.random.split(self.key)
            return key

        def dropout(
            self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> Array:
            """Zeroes a share p of all values, and scales the others to the same mean."""
            values = x.jax()
            if not training or p == 0:
                return values
            kept = jax.random.bernoulli(self.next_key("dropout"), 1 - p, values.shape)
            return jnp.where(kept, values / (1 - p), 0)

        def bernoulli(self, x: Any, p: float = 0.5) -> Any:
            """Puts 0 and 1 into x, as timm's stochastic depth draws them."""
            kept = jax.random.bernoulli(self.next_key("drop_path"), p, tuple(x.shape))
            return x.copy_(self.env.j2t_iso(kept))

        def rand(self, *size: Any, dtype: Any = None, device: Any = None) -> Array:
            """Returns numbers in [0, 1), as stochastic depth of transformers draws them."""
            shape = size[0] if isinstance(size[0], Sequence) else size
            name = str(dtype or torch.float32).removeprefix("torch.")
            return jax.random.uniform(self.next_key("drop_path"), tuple(shape), name)

        def antialiased(
            self, x: Any, size: Any = None, scale_factor: Any = None, **how: Any
        ) -> Any:
            """Resizes [b, c, h, w] along either axis by torch's own weights of its pixels."""
            values = x.jax()
            if size is None:
                scales = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor] * 2
                size = [int(n * scale) for n, scale in zip(values.shape[2:], scales, strict=True)]
                how.pop("recompute_scale_factor", None)
            sizes = size if isinstance(size, Sequence) else [size] * 2
            weights = [
                functional.interpolate(torch.eye(old)[None, None], (old, new), **how)
                for old, new in zip(values.shape[2:], sizes, strict=True)
            ]
            rows, columns = (jnp.asarray(w[0, 0].numpy(), values.dtype) for w in weights)
            resized = jnp.einsum("bchw,hi,wj->bcij", values, rows, columns)
            return self.env.j2t_iso(resized)

        def batch_norm(
            self,
            x: Any,
            running_mean: Any,
            running_var: Any,
            weight: Any = None,
            bias: Any = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Any:
            """Normalises [b, c, ...] as torch does, over the real samples of a padded batch."""
            # over one row nothing is shared between images; weights are standardised like this
            over_images = training and len(x) > 1
            if over_images and self.real is None:
                raise expect.InputError(
                    f"{self.what}: normalises over the batch in evaluation mode, so that the "
                    "features of an image depend on the others."
                )
            given = x.jax()
            values = given.astype(jnp.promote_types(given.dtype, jnp.float32))
            per_channel = (1, -1, *([1] * (values.ndim - 2)))
            if training:
                real = self.real if over_images else jnp.ones(len(values))
                mean, var, unbiased = _moments(values, real)
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    if running is not None:
                        old, new = running.jax(), jax.lax.stop_gradient(new)
                        moved = (1 - momentum) * old + momentum * new
                        self.moved[self.names[id(running)]] = moved.astype(old.dtype)
            else:
                mean, var = (t.jax().astype(values.dtype) for t in (running_mean, running_var))
            scale = jax.lax.rsqrt(var + eps)
            if weight is not None:
                scale = scale * weight.jax()
            output = (values - mean.reshape(per_channel)) * scale.reshape(per_channel)
            if bias is not None:
                output = output + bias.jax().reshape(per_channel)
            return self.env.j2t_iso(output.astype(given.dtype))

    drawn_from_key: dict[Any, Callable[..., Any]] = {
        functional.dropout: Mode.dropout,
        torch.Tensor.bernoulli_: Mode.bernoulli,
        torch.rand: Mode.rand,
    }
    return Mode


def _pairs(*given: Any) -> list[Any]:
    """Returns every argument as a pair, for rows and columns; one number stands for both."""
    return [part if isinstance(part, Sequence) else (part, part) for part in given]


def _convolved(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Array | None:
    """Convolves [b, c, h, w] with channels last; None where that is left to torchax.

    Within loops, such as that over probes, XLA leaves convolutions in torch's layout to a program
    for CPUs that takes 20 times longer.
    """
    if isinstance(padding, str) or input.ndim != 4:
        return None
    strides, margins, steps = _pairs(stride, padding, dilation)
    x, kernel = jnp.moveaxis(input.jax(), 1, -1), weight.jax().transpose(2, 3, 1, 0)
    x = jnp.pad(x, [(0, 0), *((margin, margin) for margin in margins), (0, 0)])
    height, width = kernel.shape[:2]
    is_odd_square = height == width and height % 2 == 1
    if groups == x.shape[-1] == kernel.shape[-1] and is_odd_square and max(steps) == 1:
        rows, columns = (
            slice(height // 2, n - height // 2, s)
            for n, s in zip(x.shape[1:3], strides, strict=True)
        )
        output = depthwise(x, kernel)[:, rows, columns]
    else:
        positions = [
            side - step * (size - 1)
            for side, step, size in zip(x.shape[1:3], steps, kernel.shape[:2], strict=True)
        ]
        if math.prod(positions) < height * width:
            # or else XLA takes the map for the kernel, which is 70 times slower on CPUs
            x = jax.lax.optimization_barrier(x)
        output = jax.lax.conv_general_dilated(
            x,
            kernel,
            tuple(strides),
            "VALID",
            rhs_dilation=tuple(steps),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    if bias is not None:
        output = output + bias.jax()
    return jnp.moveaxis(output, -1, 1)


def _fold(
    input: Any,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Array:
    """Adds patches [b, c * h * w, n] up to images; torchax's own cannot cut the padding off."""
    pairs = _pairs(output_size, kernel_size, dilation, padding, stride)
    sides, kernel, dilations, margins, strides = pairs
    counts, padded = [], []
    for side, k, d, p, s in zip(*pairs, strict=True):
        padded.append(side + 2 * p)
        counts.append((side + 2 * p - d * (k - 1) - 1) // s + 1)
    values = input.jax()
    values = values.reshape(len(values), -1, *kernel, *counts)
    images = jnp.zeros((*values.shape[:2], *padded), values.dtype)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            starts = (row * dilations[0], column * dilations[1])
            where = [
                slice(start, start + s * count, s)
                for start, s, count in zip(starts, strides, counts, strict=True)
            ]
            images = images.at[:, :, *where].add(values[:, :, row, column])
    (top, left), (height, width) = margins, sides
    return images[:, :, top : top + height, left : left + width]


def _moments(values: Array, real: Array | None) -> tuple[Array, Array, Array]:
    """Returns mean, variance and unbiased variance [c] of the real samples of [b, c, ...]."""
    assert real is not None  # training
    axes = (0, *range(2, values.ndim))
    real = jnp.repeat(real, len(values) // len(real))  # windows or tokens, image by image
    weights = real.astype(values.dtype).reshape(-1, *([1] * (values.ndim - 1)))
    count = real.sum() * (values[0, 0].size)
    mean = (values * weights).sum(axes) / count
    centred = values - mean.reshape(1, -1, *([1] * (values.ndim - 2)))
    var = (jnp.square(centred) * weights).sum(axes) / count
    return mean, var, var * count / jnp.maximum(count - 1, 1)
