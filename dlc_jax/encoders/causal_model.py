"""What programs ask of a language model, whether it is this package's decoder or a converted one.

Linear layers may have a low-rank change (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32, Int

from dlc_jax import expect
from dlc_jax.encoders.adapter_dropout import Keys
from dlc_jax.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_POSITIONS_AT_ONCE = 1024  # of all rows: logits of a whole batch would be gigabytes
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Tokens = Int[Array, "b t"]  # ids, or the number of each token's sequence in its row
Hidden = Float[Array, "b t d"]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which projections have a low-rank change, and of what size.

    Attributes:
      rank: Rank of the change.
      alpha: The change is multiplied by alpha / rank.
      targets: Names of projections, in `TARGETS`, or of layers of another model; all of `TARGETS`
        stand for every linear layer of the blocks, whatever they are called there.
      dropout: Share of what lora_a reads that is zeroed in training; nothing else depends on it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = dataclasses.field(default=0.0, repr=False)  # repr: fingerprints are made of it

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class RowsRead(NamedTuple):
    """What a model keeps of a batch of rows that it reads token by token.

    Attributes:
      kept: What the next token is computed with, in buffers with room for all that are to come.
      segments: 0 at the padding left of a row, 1 everywhere else, also where there is room.
      num_read: Places of every row that are read, padding included.
    """

    kept: Any
    segments: Int[Array, "b s"]
    num_read: Int[Array, ""]

    @classmethod
    def of(cls, kept: Any, segments: Tokens, num_more: int) -> RowsRead:
        """Returns that of rows which were read as a whole."""
        room = jnp.pad(segments, ((0, 0), (0, num_more)), constant_values=1)
        return cls(kept, room, jnp.asarray(segments.shape[1], jnp.int32))

    def written(self, buffer: Array, new: Array) -> Array:
        """Returns a buffer [b s ...] with what is of the next token, [b 1 ...]."""
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, self.num_read, axis=1)

    def of_next(self, buffer: Array) -> Array:
        """Returns what is of the next token, [b 1 ...], of a buffer [b s ...]."""
        return jax.lax.dynamic_slice_in_dim(buffer, self.num_read, 1, axis=1)

    def gone_on(self, kept: Any) -> RowsRead:
        """Returns that after the next token."""
        return self._replace(kept=kept, num_read=self.num_read + 1)


Model = TypeVar("Model", bound="CausalModel")


def is_called(layer: str, name: str) -> bool:
    """Whether PEFT means a layer by a name, which is whole or its end."""
    return f".{layer}".endswith(f".{name}")


class CausalModel(abc.ABC):
    """What programs ask of a language model, as a pure function of its parameters.

    Attributes:
      dtype: Type of weights and activations.
      adapter: Low-rank changes of linear layers; None: there are none.
      takes_deferred: Whether `hidden` and `logits` take parameters some of which are deferred.
    """

    dtype: str
    adapter: Adapter | None
    takes_deferred: ClassVar[bool] = False

    @abc.abstractmethod
    def hidden(
        self, params: Params, tokens: Tokens, segments: Tokens, keys: Keys | None = None
    ) -> Hidden:
        """Returns the final sequence, which `logits` takes; see `Decoder.hidden`.

        With keys, which training has, the adapter's dropout draws from them.
        """

    @abc.abstractmethod
    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns logits of some of the final sequence under these parameters."""

    def read(
        self, params: Params, tokens: Tokens, segments: Tokens, num_more: int
    ) -> tuple[Float[Array, "b d"], RowsRead]:
        """Reads rows whose last tokens are to be followed by more.

        Args:
          params: The model's parameters.
          tokens: Ids; rows that are shorter than others are padded on the left.
          segments: 1, and 0 where a row is padded.
          num_more: How many tokens are read afterwards, at most.
        Returns:
          What `logits` takes for the token after each row, and what `read_next` takes.
        """
        last = self.hidden(params, tokens, segments)[:, -1]
        return last, RowsRead.of(jnp.pad(tokens, ((0, 0), (0, num_more))), segments, num_more)

    def read_next(
        self, params: Params, tokens: Int[Array, " b"], reading: RowsRead
    ) -> tuple[Float[Array, "b d"], RowsRead]:
        """Reads one more token of each row; returns what `read` does.

        This one keeps tokens alone and computes all that was read again.
        """
        kept = reading.written(reading.kept, tokens[:, None])
        hidden = self.hidden(params, kept, reading.segments)
        return reading.of_next(hidden)[:, 0], reading.gone_on(kept)

    @abc.abstractmethod
    def abstract_adapter(self) -> Params:
        """Returns shapes and types of the adapter's parameters alone, nested as all are."""

    @abc.abstractmethod
    def is_prunable(self, path: str) -> bool:
        """Whether probes may zero a parameter: every linear layer of the blocks, nothing else."""

    @abc.abstractmethod
    def is_linear(self, path: str) -> bool:
        """Whether torch's `Linear` has the weight; an embedding that is the head counts."""

    @abc.abstractmethod
    def module_order(self, path: str) -> Any:
        """Sort key of prunable paths: torch's order of modules."""

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

    @property
    def target_names(self) -> tuple[str, ...]:
        """What targets of an adapter may be called."""
        return TARGETS

    def target_modules(self) -> list[str]:
        """Returns what PEFT calls the layers that the adapter changes."""
        return [] if self.adapter is None else list(self.adapter.targets)

    @staticmethod
    def layer_of(path: str) -> str:
        """Returns the path of the layer that a weight belongs to, as its adapter has it."""
        return path.removesuffix("/kernel")

    def is_in_out(self, path: str) -> bool:
        """Whether torch has the weight of a linear layer as [in, out], not as [out, in]."""
        return False

    def has_target(self, target: str) -> bool:
        """Whether a linear layer of the blocks is called so."""
        return target in self.target_names

    def with_adapter(self: Model, adapter: Adapter) -> Model:
        """Returns this one with low-rank changes; ValueError for a target that it does not have."""
        if set(adapter.targets) != set(TARGETS):
            for target in adapter.targets:
                if not self.has_target(target):
                    expect.one_of("lora.targets", target, self.target_names)
        return dataclasses.replace(self, adapter=adapter)  # type: ignore[type-var]

    def for_training(self: Model, adapter: Adapter, rematerialise: bool) -> Model:
        """Returns this one as it is fine-tuned; ValueError where it cannot be."""
        changed = self.with_adapter(adapter)
        return dataclasses.replace(changed, rematerialise=rematerialise)  # type: ignore[type-var]


def joined(params: Params, adapter: Params) -> Params:
    """Returns the parameters of a decoder with an adapter; both are nested alike."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapter))
