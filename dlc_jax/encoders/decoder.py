"""One decoder for Llama, Mistral, Qwen 2 and 3, and Gemma 2 and 3, token ids to logits.

`Architecture` is a decoder as a pure function of its parameters.

They differ by the switches of `DecoderConfig`, which a Hugging Face `config.json` decides. The
arithmetic is that of their torch classes in transformers, rounding steps of half precision
included.

Sources: Grattafiori et al. 2024, arXiv 2407.21783; Jiang et al. 2023, arXiv 2310.06825; Gemma Team
2024, arXiv 2408.00118; Gemma Team 2025, arXiv 2503.19786; Qwen Team 2024, arXiv 2412.15115; Qwen
Team 2025, arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dlc_jax.encoders.adapter_dropout import Keys, dropped
from dlc_jax.encoders.causal_model import (
    DTYPES,
    TARGETS,
    Adapter,
    CausalModel,
    Hidden,
    RowsRead,
    Tokens,
)
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.encoders.rotations import (
    Rotation,
    Scaling,
    places_in_sequence,
    rotate,
    rotation_of,
)
from dlc_jax.types import Params, computed

_CHANGES = ("lora_a", "lora_b")  # an adapter's matrices
_WEIGHTS = "weights of a block"
_ALL_BUT_WEIGHTS = jax.checkpoint_policies.save_anything_except_these_names(_WEIGHTS)


class Projection(nnx.Linear):
    """x @ kernel, plus a bias where there is one.

    An adapter's target gives scale * (x @ lora_a) @ lora_b besides.

    Args:
      name: In `TARGETS`.
      num_in, num_out: Its size.
      adapter: None: there is none.
      biased: Names of those that have a bias.
      dtype: Type of kernel and bias; the adapter's matrices, and what they add, are float32.
      rngs: Source of random weights; the adapter's matrices are zeros.
    """

    def __init__(
        self,
        name: str,
        num_in: int,
        num_out: int,
        *,
        adapter: Adapter | None,
        biased: tuple[str, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_in, num_out, use_bias=name in biased, param_dtype=dtype, rngs=rngs)
        self.lora_scale: float | None = None
        self.drop: Callable[[Array], Array] | None = None  # in training
        if adapter is not None and name in adapter.targets:
            self.lora_scale = adapter.scale
            self.lora_a = nnx.LoRAParam(jnp.zeros((num_in, adapter.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((adapter.rank, num_out)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        if self.bias is None:
            y = super().__call__(x)
        else:  # added before the product is rounded, as in torch
            wide = jnp.matmul(x, self.kernel[...], preferred_element_type=jnp.float32)
            y = (wide + self.bias[...].astype(jnp.float32)).astype(x.dtype)
        if self.lora_scale is None:
            return y
        wide = x.astype(jnp.float32)
        read = wide if self.drop is None else self.drop(wide)
        with precision_of("float32"):
            change = (read @ self.lora_a[...]) @ self.lora_b[...]
        return (y + change * self.lora_scale).astype(y.dtype)


Queries = Float[Array, "b q k h"]  # also what they find
Attended = Float[Array, "b s g h"]  # keys or values
Attend = Callable[[Queries, Attended, Attended], Queries]
_QUERIES_AT_ONCE, _MOST_PARTS = 128, 8  # of attention: scores of all would be t x t
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


# Switches that version 0.1 did not have
_LATER = ("norms_heads", "biases", "window_rope_theta")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches; where a switch has a default, that is Llama's.

    Attributes:
      vocab_size, width, num_heads, num_kv_heads, head_dim, mlp_width: Sizes. Each key and value
        head serves num_heads / num_kv_heads query heads.
      windows: Per block, how many tokens back attention sees, its own included; None: all.
      max_length: Longest sequence the model is meant for, in tokens.
      norm_epsilon: Added to the mean square in the norms.
      rope_theta: Base of the rotations' wavelengths.
      rope_scaling: None: as pre-trained.
      window_rope_theta: Base in blocks with a window, whose rotations are not scaled; None: blocks
        with and without one turn alike.
      attention_scale: Factor on query-key products.
      attention_cap, final_cap: Bounds of tanh soft-caps on scores and logits; None: no cap.
      activation: Activation of the gated MLP, in `ACTIVATIONS`.
      sandwich: Whether what attention and MLP add is normed too.
      offset_norm: Whether norms multiply by 1 + weight, before the cast to `dtype`.
      scale_embedding: Whether embeddings are multiplied by sqrt(width).
      tied: Whether the embedding is the head.
      norms_heads: Whether queries and keys are normed, head by head, before they are turned.
      biases: Names of projections with a bias, in `TARGETS`.
    """

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    windows: tuple[int | None, ...]
    max_length: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Scaling | None
    attention_scale: float
    attention_cap: float | None = None
    final_cap: float | None = None
    activation: str = "silu"
    sandwich: bool = False
    offset_norm: bool = False
    scale_embedding: bool = False
    tied: bool = False
    norms_heads: bool = False
    biases: tuple[str, ...] = ()
    window_rope_theta: float | None = None

    def __repr__(self) -> str:
        """Shows switches that came later only where they are on: fingerprints are made of it."""
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        )
        return f"DecoderConfig({', '.join(shown)})"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.windows)

    @property
    def period(self) -> int:
        """After how many blocks the windows start again."""
        own = self.windows
        repeats = (num for num in range(1, len(own)) if own[num:] == own[:-num])
        return next(repeats, len(own))


# Name, input and output features -> a projection of the decoder that is made.
MakeProjection = Callable[[str, int, int], Projection]


class RmsNorm(nnx.Module):
    """Divides by the root mean square over the last axis, in float32."""

    def __init__(self, config: DecoderConfig, *, width: int, dtype: DTypeLike):
        start = 0.0 if config.offset_norm else 1.0
        self.scale = nnx.Param(jnp.full((width,), start, dtype))
        self.epsilon, self.offset = config.norm_epsilon, config.offset_norm

    def __call__(self, x: Float[Array, "*b t d"]) -> Float[Array, "*b t d"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.offset:
            return (normed * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * self.scale[...]


class DecoderAttention(nnx.Module):
    """Causal self-attention with rotary positions and fewer key-value heads than query heads."""

    def __init__(self, config: DecoderConfig, linear: MakeProjection, dtype: DTypeLike):
        width, num_kv = config.width, config.num_kv_heads * config.head_dim
        self.q_proj = linear("q_proj", width, config.num_heads * config.head_dim)
        self.k_proj = linear("k_proj", width, num_kv)
        self.v_proj = linear("v_proj", width, num_kv)
        self.o_proj = linear("o_proj", config.num_heads * config.head_dim, width)
        if config.norms_heads:
            self.q_norm = RmsNorm(config, width=config.head_dim, dtype=dtype)
            self.k_norm = RmsNorm(config, width=config.head_dim, dtype=dtype)
        self.config = config

    def __call__(self, x: Hidden, rotation: Rotation, attend: Attend) -> Hidden:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, length, -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        return self.o_proj(attend(q, k, v).reshape(batch, length, -1))


class DecoderMlp(nnx.Module):
    """Gated linear unit."""

    def __init__(self, config: DecoderConfig, linear: MakeProjection):
        self.gate_proj = linear("gate_proj", config.width, config.mlp_width)
        self.up_proj = linear("up_proj", config.width, config.mlp_width)
        self.down_proj = linear("down_proj", config.mlp_width, config.width)
        self.activation = config.activation

    def __call__(self, x: Hidden) -> Hidden:
        gate = ACTIVATIONS[self.activation](self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class DecoderBlock(nnx.Module):
    """Attention and MLP, each added to its input."""

    def __init__(
        self,
        config: DecoderConfig,
        window: int | None,
        linear: MakeProjection,
        dtype: DTypeLike,
    ):
        norm = functools.partial(RmsNorm, config, width=config.width, dtype=dtype)
        self.attn = DecoderAttention(config, linear, dtype)
        self.mlp = DecoderMlp(config, linear)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.config, self.window, self.sandwich = config, window, config.sandwich
        if config.sandwich:
            self.attn_norm_after, self.mlp_norm_after = norm(), norm()

    def __call__(self, x: Hidden, rotation: Rotation, segments: Tokens) -> Hidden:
        whole = functools.partial(_whole_rows, segments, self.window, self.config)
        return self.run(x, rotation, whole)

    def run(self, x: Hidden, rotation: Rotation, attend: Attend) -> Hidden:
        """Returns what it does to a sequence, with attention that is given."""
        added = self.attn(self.attn_norm(x), rotation, attend)
        x = x + (self.attn_norm_after(added) if self.sandwich else added)
        added = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_norm_after(added) if self.sandwich else added)


class Rotations(NamedTuple):
    """Rotations of the blocks that see all tokens before, and of those with a window."""

    everywhere: Rotation
    in_windows: Rotation

    def of(self, block: DecoderBlock) -> Rotation:
        """Returns those of a block."""
        return self.everywhere if block.window is None else self.in_windows


class Decoder(nnx.Module):
    """Token ids to logits for the token after each, in two steps: `hidden`, then `logits`.

    Args:
      config: Sizes and switches.
      dtype: Type of weights and activations; norms, softmax and positions are always float32.
      adapter: Low-rank changes of projections; None: there are none.
      rngs: Source of random weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        adapter: Adapter | None = None,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            Projection, adapter=adapter, biased=config.biases, dtype=dtype, rngs=rngs
        )
        self.embedding = nnx.Embed(config.vocab_size, config.width, param_dtype=dtype, rngs=rngs)
        blocks = [DecoderBlock(config, window, linear, dtype) for window in config.windows]
        self.blocks = nnx.List(blocks)
        self.norm = RmsNorm(config, width=config.width, dtype=dtype)
        if not config.tied:
            self.head = nnx.Linear(
                config.width, config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
            )
        self.config = config

    def hidden(self, tokens: Tokens, segments: Tokens, rematerialise: bool = False) -> Hidden:
        """Returns the final, normed sequence, which `logits` takes.

        Args:
          tokens: Ids in [0, vocab_size).
          segments: Several sequences may share a row: a token sees those before it that have its
            number. Padding, left or right, is 0.
          rematerialise: Whether a gradient computes activations of a block again instead of keeping
            them.
        """
        x, rotations = self.started(tokens, segments)
        return self.norm(self.through_blocks(x, rotations, segments, rematerialise))

    def started(self, tokens: Tokens, segments: Tokens) -> tuple[Hidden, Rotations]:
        """Returns what the first block takes: embeddings, and rotations by place in sequence."""
        x = self._embedded(tokens)
        return x, self._rotations(places_in_sequence(segments), segments.shape[1], x.dtype)

    def through_blocks(
        self, x: Hidden, rotations: Rotations, segments: Tokens, rematerialise: bool = False
    ) -> Hidden:
        """Returns what the blocks make of a sequence, not normed; arguments as for `hidden`."""
        run = nnx.remat(DecoderBlock.__call__) if rematerialise else DecoderBlock.__call__
        for block in self.blocks:
            x = run(block, x, rotations.of(block), segments)
        return x

    def attended(
        self,
        tokens: Tokens,
        places: Int[Array, "b t"],
        num_places: int,
        attend: Callable[[DecoderBlock, Queries, Attended, Attended], Queries],
    ) -> Hidden:
        """Returns the final, normed sequence with attention that is given.

        Args:
          tokens: Ids in [0, vocab_size).
          places: Place of every token in its sequence.
          num_places: More than any of them.
          attend: Block, its queries, keys and values -> what its queries find.
        """
        x = self._embedded(tokens)
        rotations = self._rotations(places, num_places, x.dtype)
        for block in self.blocks:
            x = block.run(x, rotations.of(block), functools.partial(attend, block))
        return self.norm(x)

    def _embedded(self, tokens: Tokens) -> Hidden:
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        return x

    def _rotations(self, places: Int[Array, "b t"], num_places: int, dtype: DTypeLike) -> Rotations:
        config = self.config
        turn = functools.partial(
            rotation_of, places, num_places, head_dim=config.head_dim, dtype=dtype
        )
        everywhere = in_windows = turn(theta=config.rope_theta, scaling=config.rope_scaling)
        if config.window_rope_theta is not None:
            in_windows = turn(theta=config.window_rope_theta, scaling=None)
        return Rotations(everywhere, in_windows)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns logits of some of the final sequence: for a long one, all at once are large."""
        logits = self.embedding.attend(hidden) if self.config.tied else self.head(hidden)
        cap = self.config.final_cap
        return logits if cap is None else jnp.tanh(logits / cap) * cap


def _whole_rows(
    segments: Tokens,
    window: int | None,
    config: DecoderConfig,
    q: Queries,
    k: Attended,
    v: Attended,
) -> Queries:
    """Returns what queries find in whole rows, some queries after the other."""
    length = q.shape[1]
    step = max(_QUERIES_AT_ONCE, -(-length // _MOST_PARTS))
    parts = []
    for start in range(0, length, step):
        asking = slice(start, min(start + step, length))
        # what none of them can see costs nothing
        first = 0 if window is None else max(0, start + 1 - window)
        seen = slice(first, asking.stop)
        back = jnp.arange(asking.start, asking.stop)[:, None] - jnp.arange(seen.start, seen.stop)
        mask = _visible(back, window, segments[:, asking], segments[:, seen])
        parts.append(_attention(q[:, asking], k[:, seen], v[:, seen], mask, config))
    return jnp.concatenate(parts, axis=1)


def _visible(
    back: Int[Array, "q s"],
    window: int | None,
    asking: Int[Array, "b q"],
    seen: Int[Array, "b s"],
) -> Bool[Array, "b 1 q s"]:
    """Returns which tokens each one that asks sees.

    Args:
      back: How far back each one lies, in tokens.
      window: How many tokens back are seen, its own included; None: all.
      asking, seen: Numbers of the sequences that both are of.
    """
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near[None, None] & (asking[:, None, :, None] == seen[:, None, None])


def _attention(
    q: Queries, k: Attended, v: Attended, mask: Bool[Array, "b 1 q s"], config: DecoderConfig
) -> Queries:
    scale, cap = config.attention_scale, config.attention_cap
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
    batch, length, num_heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("btgrh,bsgh->bgrts", q, k) * jnp.asarray(scale, q.dtype)
    scores = jnp.tanh(scores / cap) * cap
    scores = jnp.where(mask[:, :, None], scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgh->btgrh", shares, v).reshape(batch, length, num_heads, head_dim)


@dataclasses.dataclass(frozen=True)
class Architecture(CausalModel):
    """What programs are specialised to: hashable, no weights in it.

    Attributes:
      config: Sizes and switches.
      dtype: Type of weights and activations.
      adapter: Low-rank changes of projections; None: there are none.
      rematerialise: See `Decoder.hidden`.
      loops: Whether blocks that are alike are compiled once, where there are several.
    """

    takes_deferred: ClassVar[bool] = True

    config: DecoderConfig
    dtype: str
    adapter: Adapter | None = None
    rematerialise: bool = False
    loops: bool = dataclasses.field(default=True, repr=False)  # fingerprints are made of the repr

    def hidden(
        self, params: Params, tokens: Tokens, segments: Tokens, keys: Keys | None = None
    ) -> Hidden:
        """Returns the final, normed sequence under these parameters; see `Decoder`."""
        if self.is_looped(has_keys=keys is not None):
            return self._looped(params, tokens, segments)
        module = self._module(params)
        if keys is not None and self.adapter is not None:
            drop = functools.partial(dropped, keys=keys, rate=self.adapter.dropout)
            for path, part in nnx.iter_modules(module):
                if isinstance(part, Projection):
                    part.drop = functools.partial(drop, layer="/".join(map(str, path)))
        with precision_of(self.dtype):
            return module.hidden(tokens, segments, self.rematerialise)

    def is_looped(self, has_keys: bool) -> bool:
        """Whether blocks that are alike are compiled once; with keys, layers draw by their path."""
        return self.loops and not has_keys and 0 < 2 * self.config.period <= self.config.depth

    def _looped(self, params: Params, tokens: Tokens, segments: Tokens) -> Hidden:
        """Returns what `hidden` does, in a loop with a turn for every period of blocks.

        A turn copies the weights of its own blocks: stacked, all weights would be held twice. One
        copy is there at a time where XLA schedules for memory; for CPUs it copies those of a whole
        turn first. A gradient copies them again instead of keeping the copies. Adapters, which are
        small, are stacked.
        """
        windows, blocks = self.config.windows, params["blocks"]
        period = self.config.period
        num_turns = len(windows) // period
        policy = None if self.rematerialise else _ALL_BUT_WEIGHTS
        runs, changes = [], []
        for place in range(period):
            turns = [_parted(blocks[place + number * period]) for number in range(num_turns)]
            weights, matrices = zip(*turns, strict=True)
            part = self._with_windows(windows[place : place + 1])
            choices: list[Callable[[], Params]] = [
                functools.partial(dict, some) for some in weights
            ]
            run = functools.partial(part._run_one, params, choices)
            runs.append(jax.checkpoint(run, policy=policy, prevent_cse=False))
            changes.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices))
        with precision_of(self.dtype):
            ends = self._with_windows(())._module(params)
            x, rotations = ends.started(tokens, segments)

            def turn(x: Hidden, own: tuple[Int[Array, ""], list[Params]]) -> tuple[Hidden, None]:
                for run, change in zip(runs, own[1], strict=True):
                    x = run(own[0], change, x, rotations, segments)
                return x, None

            x, _ = jax.lax.scan(turn, x, (jnp.arange(num_turns), changes))
            left = range(num_turns * period, len(windows))
            rest = self._with_windows(windows[left.start :])._module(
                params | {"blocks": {i: blocks[place] for i, place in enumerate(left)}}
            )
            return ends.norm(rest.through_blocks(x, rotations, segments, self.rematerialise))

    def _run_one(
        self,
        params: Params,
        choices: Sequence[Callable[[], Params]],
        number: Int[Array, ""],
        change: Params,
        x: Hidden,
        rotations: Rotations,
        segments: Tokens,
    ) -> Hidden:
        """Returns what one block, of those that there are to choose from, makes of a sequence."""
        weights = checkpoint_name(jax.lax.switch(number, choices), _WEIGHTS)
        module = self._module(params | {"blocks": {0: unflatten_dict(weights | change)}})
        return module.through_blocks(x, rotations, segments)

    def _with_windows(self, windows: tuple[int | None, ...]) -> Architecture:
        """Returns a decoder of blocks with these windows."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, windows=windows))

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns logits of some of the final sequence under these parameters."""
        with precision_of(self.dtype):
            return self._with_windows(())._module(params).logits(hidden)

    def read(
        self, params: Params, tokens: Tokens, segments: Tokens, num_more: int
    ) -> tuple[Float[Array, "b d"], RowsRead]:
        """Reads rows and keeps the keys and values of each block; see `CausalModel.read`."""
        kept = []

        def attend(block: DecoderBlock, q: Queries, k: Attended, v: Attended) -> Queries:
            room = ((0, 0), (0, num_more), (0, 0), (0, 0))
            kept.append((jnp.pad(k, room), jnp.pad(v, room)))
            return _whole_rows(segments, block.window, self.config, q, k, v)

        places, length = places_in_sequence(segments), segments.shape[1]
        with precision_of(self.dtype):
            hidden = self._module(params).attended(tokens, places, length, attend)
        return hidden[:, -1], RowsRead.of(kept, segments, num_more)

    def read_next(
        self, params: Params, tokens: Int[Array, " b"], reading: RowsRead
    ) -> tuple[Float[Array, "b d"], RowsRead]:
        """Reads one more token of each row, with the keys and values of those before."""
        segments, kept, before = reading.segments, [], iter(reading.kept)
        back = (reading.num_read - jnp.arange(segments.shape[1]))[None]

        def attend(block: DecoderBlock, q: Queries, k: Attended, v: Attended) -> Queries:
            keys, values = map(reading.written, next(before), (k, v))
            kept.append((keys, values))
            mask = _visible(back, block.window, reading.of_next(segments), segments)
            return _attention(q, keys, values, mask, self.config)

        places = reading.of_next(places_in_sequence(segments))
        with precision_of(self.dtype):
            module = self._module(params)
            hidden = module.attended(tokens[:, None], places, segments.shape[1], attend)
        return hidden[:, 0], reading.gone_on(kept)

    def abstract_params(self) -> Params:
        """Returns shapes and types of all parameters; no memory is taken."""
        return nnx.to_pure_dict(_split(self)[1])

    def abstract_adapter(self) -> Params:
        """Returns shapes and types of the adapter's parameters alone, nested as all are."""
        return unflatten_dict(_parted(self.abstract_params())[1])

    def is_prunable(self, path: str) -> bool:
        """Every linear projection of the blocks; not the embedding, the head or a norm."""
        return path.startswith("blocks/") and path.endswith("/kernel")

    def is_linear(self, path: str) -> bool:
        """Every projection of the blocks, and the head."""
        return path.endswith("/kernel") or (self.config.tied and path.startswith("embedding/"))

    def module_order(self, path: str) -> tuple[int, int]:
        """Sort key of prunable paths: torch's order of modules."""
        _, block, _, layer, _ = path.split("/")
        return int(block), TARGETS.index(layer)

    def _module(self, params: Params) -> Decoder:
        """Returns a decoder with these parameters, of which there may be more than it has."""
        blocks = {place: params["blocks"][place] for place in range(self.config.depth)}
        own = {name: part for name, part in params.items() if name != "blocks"}
        if blocks:
            own["blocks"] = blocks
        return nnx.merge(_split(self)[0], nnx.State(computed(own)))


def _parted(params: Params) -> tuple[dict[tuple, Any], dict[tuple, Any]]:
    """Returns the weights and the adapter's matrices among parameters, by path."""
    leaves = flatten_dict(params)
    changes = {path: leaf for path, leaf in leaves.items() if path[-1] in _CHANGES}
    return {path: leaf for path, leaf in leaves.items() if path not in changes}, changes


@functools.lru_cache
def _split(architecture: Architecture) -> tuple[nnx.GraphDef, nnx.State]:
    build = functools.partial(Decoder, architecture.config, adapter=architecture.adapter)
    dtype = DTYPES[architecture.dtype]
    return nnx.split(nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0))))
