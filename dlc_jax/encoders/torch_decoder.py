"""Any dense causal language model of transformers as a decoder, converted from torch.

`TorchDecoder` has what programs ask of `decoder.Architecture`, for every class behind
`AutoModelForCausalLM` that self-attention alone carries from token to token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlc_jax import expect
from dlc_jax.encoders.adapter_dropout import Keys, dropped
from dlc_jax.encoders.causal_model import (
    DTYPES,
    TARGETS,
    Adapter,
    CausalModel,
    Hidden,
    Tokens,
    is_called,
)
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.encoders.rotations import places_in_sequence
from dlc_jax.encoders.torch_functions import optional
from dlc_jax.encoders.torch_modules import IN_OUT, LINEAR, Converted, environment
from dlc_jax.types import Params

_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_IF_NONE_STATED = 2048  # tokens


class TorchSizes(NamedTuple):
    """What consumers of a model need to know, as `decoder.DecoderConfig` has it.

    Attributes:
      vocab_size: Number of tokens that have an embedding.
      max_length: Longest sequence the model is meant for, in tokens.
      tied: Whether the embedding is the head.
    """

    vocab_size: int
    max_length: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> TorchSizes:
        """Returns what a configuration of transformers states."""
        stated = (getattr(config, name, None) for name in _LONGEST)
        longest = next((length for length in stated if length and length > 0), _IF_NONE_STATED)
        ropes = [
            value
            for _, value in flat({"all": getattr(config, "rope_parameters", None)})
            if isinstance(value, dict) and value.get("rope_type") == "longrope"
        ]
        # beyond, the longest sequence of a batch would decide the rotations of all
        original = [rope["original_max_position_embeddings"] for rope in ropes]
        return cls(config.vocab_size, min([longest, *original]), bool(config.tie_word_embeddings))


def flat(settings: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yields names and values of a configuration, and of all that it holds."""
    for key, value in settings.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from flat(value)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CausalNetwork:
    """A class of transformers with its configuration, without weights.

    Attributes:
      converted: The module.
      body: Name of the part that gives the final sequence; the rest of the module makes logits.
      output: Class of what that part gives.
      layers: Names of the weights of linear layers in its blocks, in torch's order.
      parts: Names of all modules inside.
      shapes: Shapes and types of all tensors.
      stored: Names of those that a checkpoint holds.
      blocks: Names of the blocks that a gradient can compute again.
      sizes: See `TorchSizes`.
      function: Class and configuration, in words.
      takes_mask: Whether it takes a mask of what each token sees; others see that from positions.
    """

    converted: Converted
    body: str
    output: type
    layers: tuple[str, ...]
    parts: frozenset[str]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    stored: frozenset[str]
    blocks: tuple[str, ...]
    sizes: TorchSizes
    function: str
    takes_mask: bool = False

    def __repr__(self) -> str:
        return self.function

    @property
    def what(self) -> str:
        """What messages call it."""
        return self.converted.what


@dataclasses.dataclass(frozen=True)
class TorchDecoder(CausalModel):
    """What programs are specialised to: hashable, no weights in it.

    Parameters are a flat dictionary by torch's names, in torch's layouts, and the matrices of an
    adapter as `<layer>/lora_a` [in, r] and `<layer>/lora_b` [r, out].

    Attributes:
      network: The module.
      dtype: Type of weights and activations.
      adapter: Low-rank changes of linear layers; None: there are none.
      rematerialise: Whether a gradient computes activations of a block again instead of keeping
        them.
    """

    network: CausalNetwork
    dtype: str
    adapter: Adapter | None = None
    rematerialise: bool = False

    @property
    def config(self) -> TorchSizes:
        return self.network.sizes

    def hidden(
        self, params: Params, tokens: Tokens, segments: Tokens, keys: Keys | None = None
    ) -> Hidden:
        """Returns the final sequence, [b, t, d], which `logits` takes; see `Decoder.hidden`."""

        def run(module: Any, tokens: Any, positions: Any, mask: Any = None) -> Any:
            if self.rematerialise:
                for block in map(module.get_submodule, self.network.blocks):
                    # `Converted.call` puts things right
                    block.forward = _computed_again(block.forward)
            with self._adapted(module, params, keys):
                return self._sequence(
                    module, input_ids=tokens, position_ids=positions, attention_mask=mask
                )

        masks = [_hiding(segments, self.dtype)] if self.network.takes_mask else []
        return self._run(run, params, tokens, places_in_sequence(segments), *masks)

    def plain(self, params: Params, tokens: Tokens) -> Hidden:
        """Returns the final sequence of whole rows as the class itself counts their places."""

        def run(module: Any, tokens: Any) -> Any:
            return self._sequence(module, input_ids=tokens)

        return self._run(run, params, tokens)

    def _sequence(self, module: Any, **given: Any) -> Any:
        """Runs a module; returns what its inner model gives."""
        found: list[Any] = []
        body = module.get_submodule(self.network.body)
        with hooked(body, lambda _, __, output: found.append(output)):
            module(**given, use_cache=False)
        return found[0][0]

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Returns logits of some of the final sequence under these parameters."""

        def run(module: Any, hidden: Any, tokens: Any) -> Any:
            body = module.get_submodule(self.network.body)
            given = self.network.output(last_hidden_state=hidden)
            body.forward = lambda *_, **__: given  # `Converted.call` puts things right
            return module(input_ids=tokens, use_cache=False).logits

        rows = hidden.reshape(1, -1, hidden.shape[-1])
        found = self._run(run, params, rows, jnp.zeros(rows.shape[:2], jnp.int32))
        return found.reshape(*hidden.shape[:-1], -1)

    def abstract_adapter(self) -> Params:
        """Returns shapes and types of the adapter's parameters alone."""
        if self.adapter is None:
            return {}
        found = {}
        for name in self.targeted():
            shape = self.network.shapes[name].shape
            num_in, num_out = shape if self.is_in_out(name) else shape[::-1]
            shapes = {"lora_a": (num_in, self.adapter.rank), "lora_b": (self.adapter.rank, num_out)}
            for matrix, size in shapes.items():
                path = f"{self.layer_of(name)}/{matrix}"
                found[path] = jax.ShapeDtypeStruct(size, jnp.float32)
        return found

    def targeted(self) -> list[str]:
        """Returns the weights that the adapter changes."""
        targets = () if self.adapter is None else self.adapter.targets
        if set(targets) == set(TARGETS):
            return list(self.network.layers)
        return [name for name in self.network.layers if self._is_one_of(name, targets)]

    def has_target(self, target: str) -> bool:
        """Whether a linear layer of the blocks is called so, in full or at the end."""
        return any(self._is_one_of(name, [target]) for name in self.network.layers)

    def _is_one_of(self, weight: str, targets: Iterable[str]) -> bool:
        return any(is_called(self.layer_of(weight), target) for target in targets)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The last parts of the names of linear layers."""
        return tuple(dict.fromkeys(_last(self.layer_of(name)) for name in self.network.layers))

    def target_modules(self) -> list[str]:
        """Returns what PEFT calls the layers that the adapter changes, in short where that does."""
        changed = set(self.targeted())
        names = list(dict.fromkeys(_last(self.layer_of(name)) for name in changed))
        layers = set(map(self.layer_of, changed))
        if any(_last(part) in names for part in self.network.parts - layers):
            return sorted(layers)
        return sorted(names)

    @staticmethod
    def layer_of(path: str) -> str:
        """Returns the name of the layer that a weight belongs to."""
        return path.removesuffix(".weight")

    def for_training(self, adapter: Adapter, rematerialise: bool) -> TorchDecoder:
        """Returns this one as it is fine-tuned; ValueError where it cannot be."""
        if rematerialise and not self.network.blocks:
            raise expect.InputError(
                f"lora.rematerialise: True, but activations of {self.network.what} cannot "
                "be computed again block by block; expected False."
            )
        return super().for_training(adapter, rematerialise)

    def is_in_out(self, path: str) -> bool:
        """Whether torch has the weight of a linear layer as [in, out]; most classes do not."""
        return self.network.converted.layers.get(path) == IN_OUT

    def is_prunable(self, path: str) -> bool:
        """Every linear layer of the blocks; not embeddings, the head or norms."""
        return path in self.network.layers

    def is_linear(self, path: str) -> bool:
        """Every weight of a `Linear`, wherever it is."""
        return self.network.converted.layers.get(path) == LINEAR

    def module_order(self, path: str) -> int:
        """Sort key of prunable paths: torch's order of modules."""
        return self.network.layers.index(path)

    def _run(self, run: Callable[..., Any], params: Params, *args: Array) -> Array:
        tensors = {name: params[name] for name in self.network.shapes}
        with precision_of(self.dtype):
            output, changed = self.network.converted.call(run, tensors, *map(jnp.asarray, args))
        if changed:
            raise expect.InputError(
                f"{self.network.what}: changes {expect.listed(changed)} while it is "
                "evaluated; expected a function of tokens and weights."
            )
        return output

    @contextlib.contextmanager
    def _adapted(self, module: Any, params: Params, keys: Keys | None) -> Iterator[None]:
        """Makes linear layers add scale * (x @ lora_a) @ lora_b to what they give, in float32."""
        if self.adapter is None:
            yield
            return
        env, scale, rate = environment(), self.adapter.scale, self.adapter.dropout

        def changed(layer: str, _: Any, args: Any, output: Any) -> Any:
            x, y = args[0].jax(), output.jax()
            lora_a, lora_b = params[f"{layer}/lora_a"], params[f"{layer}/lora_b"]
            read = x.astype(jnp.float32)
            if keys is not None:
                read = dropped(read, keys=keys, layer=layer, rate=rate)
            with precision_of("float32"):
                change = (read @ lora_a) @ lora_b
            return env.j2t_iso((y + change * scale).astype(y.dtype))

        with contextlib.ExitStack() as stack:
            for name in self.targeted():
                layer = self.layer_of(name)
                hook = functools.partial(changed, layer)
                stack.enter_context(hooked(module.get_submodule(layer), hook))
            yield


def _last(layer: str) -> str:
    return layer.rpartition(".")[2]


@contextlib.contextmanager
def hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Makes a module hand what it gives to a function, which may give something else."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _hiding(segments: Tokens, dtype: str) -> Float[Array, "b 1 t t"]:
    """Returns what is added to the scores of attention: next to nothing is left of what is hidden.

    A token sees those of its sequence up to itself.
    """
    places = jnp.arange(segments.shape[1])
    is_seen = (segments[:, :, None] == segments[:, None, :]) & (places[:, None] >= places)
    return jnp.where(is_seen, 0, jnp.finfo(DTYPES[dtype]).min)[:, None].astype(DTYPES[dtype])


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of a block whose activations a gradient computes again."""
    env = environment()
    array_class = optional("torchax", "lora.rematerialise").tensor.Tensor

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, array_class)]

        @jax.checkpoint
        def again(arrays: list[Array]) -> Any:
            for i, array in zip(places, arrays, strict=True):
                leaves[i] = env.j2t_iso(array)
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return env.t2j_iso(forward(*args, **kwargs))

        return env.j2t_iso(again([leaves[i].jax() for i in places]))

    return run
