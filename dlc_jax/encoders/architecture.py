"""A decoder as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32

from dlc_jax.encoders.decoder import Adapter, Decoder, DecoderConfig, Hidden, Tokens
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_POSITIONS_AT_ONCE = 1024  # of all rows: logits of a whole batch would be gigabytes


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What programs are specialised to: hashable, no weights in it.

    Attributes:
      config: Sizes and switches.
      dtype: Type of weights and activations.
      adapter: Low-rank changes of projections; None: there are none.
      rematerialise: See `Decoder.hidden`.
    """

    config: DecoderConfig
    dtype: str
    adapter: Adapter | None = None
    rematerialise: bool = False

    def hidden(self, params: Params, tokens: Tokens, segments: Tokens) -> Hidden:
        """Returns the final, normed sequence under these parameters; see `Decoder`."""
        with precision_of(self.dtype):
            return self._module(params).hidden(tokens, segments, self.rematerialise)

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns logits of some of the final sequence under these parameters."""
        with precision_of(self.dtype):
            return self._module(params).logits(hidden)

    def cross_entropies(
        self, params: Params, hidden: Hidden, target: Tokens
    ) -> Float32[Array, "b t"]:
        """Returns -log softmax of each target, some positions after the other."""
        num_rows, length, width = hidden.shape
        num_at_once = max(1, _POSITIONS_AT_ONCE // num_rows)  # of every row
        num_parts = -(-length // num_at_once)
        missing = num_parts * num_at_once - length
        hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
        target = jnp.pad(target, ((0, 0), (0, missing)))

        @jax.checkpoint  # a gradient would keep the logits of all positions otherwise
        def of_part(part: tuple[Array, Array]) -> Float32[Array, "b s"]:
            logits = self.logits(params, part[0]).astype(jnp.float32)
            picked = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - picked

        parts = (
            hidden.reshape(num_rows, num_parts, -1, width).swapaxes(0, 1),
            target.reshape(num_rows, num_parts, -1).swapaxes(0, 1),
        )
        found = jax.lax.map(of_part, parts).swapaxes(0, 1)
        return found.reshape(num_rows, -1)[:, :length]

    def abstract_params(self) -> Params:
        """Returns shapes and types of all parameters; no memory is taken."""
        return nnx.to_pure_dict(_split(self)[1])

    def abstract_adapter(self) -> Params:
        """Returns shapes and types of the adapter's parameters alone, nested as all are."""
        leaves = flatten_dict(self.abstract_params())
        kept = {path: leaf for path, leaf in leaves.items() if path[-1] in ("lora_a", "lora_b")}
        return unflatten_dict(kept)

    def with_adapter(self, adapter: Adapter) -> Architecture:
        """Returns this one with low-rank changes."""
        return dataclasses.replace(self, adapter=adapter)

    def _module(self, params: Params) -> Decoder:
        return nnx.merge(_split(self)[0], nnx.State(params))


@functools.lru_cache
def _split(architecture: Architecture) -> tuple[nnx.GraphDef, nnx.State]:
    build = functools.partial(Decoder, architecture.config, adapter=architecture.adapter)
    dtype = DTYPES[architecture.dtype]
    return nnx.split(nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0))))


def joined(params: Params, adapter: Params) -> Params:
    """Returns the parameters of a decoder with an adapter; both are nested alike."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapter))
