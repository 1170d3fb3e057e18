"""What scoring and fine-tuning a language model take on every device, from shapes alone.

Tests compare it with what XLA says of compiled programs. Of two things that are never there at the
same time only the larger counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dlc_jax.distributed import partition
from dlc_jax.encoders.causal_model import joined
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.masking import thresholds
from dlc_jax.planning.memory import Memory, MemoryPlan, Values, doubled, halved, tree_bytes
from dlc_jax.planning.programs import peak_bytes
from dlc_jax.preprocess.token_batches import bucket_length
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Optimiser
from dlc_jax.types import by_path

_COUNTING, _BLOCKS, _LOGITS = "counting", "blocks", "logits"  # never at the same time
_KEYS = 3 * 4  # bytes per weight of a leaf that is counted: its key, its bin, its place
_BINS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How instructions are scored.

    Attributes:
      config: Sizes and switches of the model.
      dtype: Type of its weights and activations.
      masking, num_probes, tokens_per_batch: See `probe_responses`.
      max_length: Longest sequence in tokens.
      fsdp: Devices that weights are spread over.
      groups: Number of groups of `fsdp` devices that share the rows of a call.
      holds_copy: Whether a whole masked copy of the weights is held.
    """

    config: DecoderConfig
    dtype: str
    masking: str
    num_probes: int
    tokens_per_batch: int
    max_length: int
    fsdp: int
    groups: int = 1
    holds_copy: bool = False

    @property
    def num_devices(self) -> int:
        return self.fsdp * self.groups

    def describe(self) -> str:
        return (
            f"{self.num_probes} probes in {self.dtype}, {self.tokens_per_batch} tokens per batch, "
            f"{self.max_length} per sequence"
        )

    def changes(self) -> Iterator[Values]:
        change = functools.partial(dataclasses.replace, self)
        yield halved("probe.tokens_per_batch", self.tokens_per_batch, 256, change)
        yield from _smaller_models(self)

    def plan(self) -> MemoryPlan:
        """Returns the plan for the lengths of batches that take most."""
        lengths = {bucket_length(2**i, self.max_length) for i in range(32)}
        if 2 * self.max_length <= self.tokens_per_batch:  # two of the longest may share a row
            lengths.add(2 * self.max_length)
        return max(map(self._plan, sorted(lengths)), key=lambda plan: plan.num_bytes)

    def _plan(self, length: int) -> MemoryPlan:
        whole = Architecture(self.config, self.dtype)
        num_rows = -(-max(1, self.tokens_per_batch // length) // self.num_devices)
        leaves = by_path(whole.abstract_params())
        prunable = [leaf for path, leaf in leaves.items() if whole.is_prunable(path)]
        num_prunable = sum(leaf.size for leaf in prunable)
        item = prunable[0].dtype.itemsize
        largest = max(leaf.size for leaf in prunable)
        bins = 4 * _BINS * self.num_probes
        counted = _KEYS * largest + bins if num_prunable >= thresholds.TOO_MANY_TO_SORT else 0
        of_random = 4 if self.masking == "random" else 0
        copied = item + of_random + item  # taken out of all, and masked
        if self.holds_copy:  # made before any call, with masks of the host
            counted, copied = 0, item
        copies = -(-num_prunable * copied // (self.config.depth * self.fsdp))
        return MemoryPlan.of(
            Memory("weights", weight_bytes(whole, self.fsdp)),
            Memory("masked copy of the weights", weight_bytes(whole, self.fsdp) * self.holds_copy),
            Memory("importance of weights", of_random * num_prunable // self.fsdp),
            Memory("thresholds: keys of a layer, counts", counted, _COUNTING),
            Memory("copies of the weights of a block", copies, _BLOCKS),
            _gathered(whole, self.fsdp, 1 if whole.is_looped(has_keys=False) else 2),
            Memory("activations of a block", _forward(whole, num_rows, length), _BLOCKS),
            Memory("logits of some positions", _logits(whole, num_rows, length), _LOGITS),
            _all_rows(whole, num_rows, length, self.fsdp),
        )


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """How a language model is fine-tuned.

    Attributes:
      config: Sizes and switches of the model.
      lora: Settings.
      max_length: Longest sequence in tokens.
      fsdp: Devices that weights are spread over.
      groups: Number of groups of `fsdp` devices that share the rows of a call.
    """

    config: DecoderConfig
    lora: LoraConfig
    max_length: int
    fsdp: int
    groups: int = 1

    @property
    def num_devices(self) -> int:
        return self.fsdp * self.groups

    def describe(self) -> str:
        lora = self.lora
        again = "computed again" if lora.rematerialise else "kept"
        return (
            f"LoRA of rank {lora.rank} in {lora.dtype}, {lora.rows_at_once} rows of "
            f"{self.max_length} tokens at once, activations {again}"
        )

    def changes(self) -> Iterator[Values]:
        def change(**settings: Any) -> Finetuning:
            return dataclasses.replace(self, lora=dataclasses.replace(self.lora, **settings))

        if not self.lora.rematerialise:
            yield [("lora.rematerialise=True", change(rematerialise=True))]
        yield halved("lora.rows_at_once", self.lora.rows_at_once, self.num_devices, change)
        yield from _smaller_models(self)

    def plan(self) -> MemoryPlan:
        """Returns the plan for batches as long as can be."""
        lora, depth = self.lora, self.config.depth
        whole = Architecture(self.config, lora.dtype).for_training(lora.adapter, lora.rematerialise)
        num_rows = -(-lora.rows_at_once // self.num_devices)
        of_block = _with_depth(whole, 1).abstract_adapter()
        adapter = tree_bytes(of_block) * depth
        optimiser = tree_bytes(jax.eval_shape(Optimiser.of(lora).at(0.0).init, of_block)) * depth
        kept, block = _gradient(whole, num_rows, self.max_length)
        kept = max(0, kept - tree_bytes(of_block)) * depth
        logits = _logits(whole, num_rows, self.max_length, gradient=True)
        # without a loop the next block's weights come early, and kept activations keep all; within
        # a turn of several blocks some come early
        num_gathered, copies = 2 if lora.rematerialise else depth, 0
        if whole.is_looped(has_keys=bool(lora.dropout)):
            num_gathered = min(3, self.config.period)
            copies = _of_blocks(whole) // (depth * self.fsdp)
        return MemoryPlan.of(
            Memory("weights", weight_bytes(_frozen(whole), self.fsdp)),
            Memory("adapter", adapter),
            Memory(f"optimiser ({lora.optimiser})", optimiser),
            Memory("gradients: sums, and a call's", 2 * adapter),
            _gathered(whole, self.fsdp, num_gathered),
            Memory("copies of the weights of a block", copies, _BLOCKS),
            Memory("activations kept", kept),
            Memory("activations of a block", block, _BLOCKS),
            Memory("logits of some positions", logits, _LOGITS),
            _all_rows(whole, num_rows, self.max_length, self.fsdp),
        )


def _smaller_models(job: Scoring | Finetuning) -> Iterator[Values]:
    change = functools.partial(dataclasses.replace, job)
    yield halved("encoder.max_length", job.max_length, 128, change)
    yield doubled("mesh.fsdp={}", job.fsdp, job.groups, lambda num: change(fsdp=num))


def weight_bytes(architecture: Architecture, fsdp: int) -> int:
    """Returns the bytes of weights on every device, exactly."""
    total = 0
    for path, leaf in by_path(architecture.abstract_params()).items():
        is_spread = any(axis is not None for axis in partition(path, leaf.shape, fsdp))
        total += leaf.size * leaf.dtype.itemsize // (fsdp if is_spread else 1)
    return total


def _gathered(architecture: Architecture, fsdp: int, num_blocks: int) -> Memory:
    """Weights of blocks that are spread, while they are used."""
    depth = architecture.config.depth
    num_blocks = min(num_blocks, depth)
    num_bytes = 0 if fsdp == 1 else _of_blocks(architecture) * num_blocks // depth
    blocks = "a block" if num_blocks == 1 else f"{num_blocks} blocks"
    always = Memory(f"gathered weights of {blocks}", num_bytes)
    return always._replace(when=_BLOCKS) if num_blocks < depth else always


def _of_blocks(architecture: Architecture) -> int:
    """Returns the bytes of the frozen weights of all blocks."""
    leaves = by_path(_frozen(architecture).abstract_params())
    return tree_bytes([leaf for path, leaf in leaves.items() if path.startswith("blocks/")])


def _all_rows(architecture: Architecture, num_rows: int, length: int, fsdp: int) -> Memory:
    """Embedding and head are spread by tokens of the vocabulary: there every device sees all rows.

    Before, and after what is summed up over devices.
    """
    hidden = _hidden(architecture, num_rows * fsdp, length)
    return Memory("first and last layer of all rows", 0 if fsdp == 1 else 2 * tree_bytes(hidden))


@functools.lru_cache
def _forward(architecture: Architecture, num_rows: int, length: int) -> int:
    one = _with_depth(architecture, 1)
    tokens = _tokens(num_rows, length)
    return peak_bytes(one.hidden, one.abstract_params(), tokens, tokens)


@functools.lru_cache
def _gradient(architecture: Architecture, num_rows: int, length: int) -> tuple[int, int]:
    """Returns what the gradient keeps of every block, and what it takes besides."""
    tokens, keys = _tokens(num_rows, length), None
    if architecture.adapter is not None and architecture.adapter.dropout:
        keys = jax.ShapeDtypeStruct((num_rows, length, 2), jnp.uint32)

    def peak(depth: int) -> int:
        some = _with_depth(architecture, depth)

        def total(adapter: Any, params: Any, tokens: jax.Array, keys: Any) -> jax.Array:
            whole = joined(params, adapter)
            return some.hidden(whole, tokens, tokens, keys).astype(jnp.float32).sum()

        params, adapter = _frozen(some).abstract_params(), some.abstract_adapter()
        return peak_bytes(jax.grad(total), adapter, params, tokens, keys)

    two, three = peak(2), peak(3)
    return three - two, two - 2 * (three - two)


@functools.lru_cache
def _logits(
    architecture: Architecture, num_rows: int, length: int, *, gradient: bool = False
) -> int:
    no_blocks = _frozen(_with_depth(architecture, 0))
    hidden, tokens = _hidden(architecture, num_rows, length), _tokens(num_rows, length)

    def total(hidden: jax.Array, params: Any, tokens: jax.Array) -> jax.Array:
        return no_blocks.cross_entropies(params, hidden, tokens).sum()

    function: Callable = jax.grad(total) if gradient else total
    return peak_bytes(function, hidden, no_blocks.abstract_params(), tokens)


def _frozen(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, adapter=None, rematerialise=False)


def _with_depth(architecture: Architecture, depth: int) -> Architecture:
    """Returns a decoder of so many blocks, of those that take most."""
    config = architecture.config
    widest = None if None in config.windows else max(window or 0 for window in config.windows)
    windows = (widest,) * depth
    return dataclasses.replace(architecture, config=dataclasses.replace(config, windows=windows))


def _hidden(architecture: Architecture, num_rows: int, length: int) -> jax.ShapeDtypeStruct:
    shape = (num_rows, length, architecture.config.width)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(architecture.dtype))


def _tokens(num_rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_rows, length), jnp.int32)
