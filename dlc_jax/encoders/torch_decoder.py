"""Any dense causal language model of transformers as a decoder, converted from torch.

`TorchDecoder` has what programs ask of `decoder.Architecture`, for every class behind
`AutoModelForCausalLM` that self-attention alone carries from token to token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dlc_jax import expect
from dlc_jax.distributed import fetch, over_devices, place, sharding_of
from dlc_jax.encoders.converted import prunable_layers
from dlc_jax.encoders.decoder import DTYPES, TARGETS, Adapter, CausalModel, Hidden, Tokens
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.encoders.stored_tensors import matches, stored_tensors
from dlc_jax.encoders.torch_functions import optional, quiet
from dlc_jax.encoders.torch_modules import Converted, environment
from dlc_jax.types import Params

_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_IF_NONE_STATED = 2048  # tokens
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "architectures", "use_cache"}
# Buffers that old checkpoints hold; of masks, those of shape [1, 1, n, n]
_BUFFERS = (r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)", r".*\.masked_bias")
_MASKS = (r".*\.(bias|causal_mask)",)
_OTHER_THAN_TEXT = re.compile("vision|image|audio|speech|video|vq")
_LATER = "later tokens"
_TOLERANCE = 1e-3  # relative, of what should be equal; a token that is seen wrongly makes more
_WAYS_OUT = "Take another variant of the model."


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
            for _, value in _flat({"all": getattr(config, "rope_parameters", None)})
            if isinstance(value, dict) and value.get("rope_type") == "longrope"
        ]
        # beyond, the longest sequence of a batch would decide the rotations of all
        original = [rope["original_max_position_embeddings"] for rope in ropes]
        return cls(config.vocab_size, min([longest, *original]), bool(config.tie_word_embeddings))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CausalNetwork:
    """A class of transformers with its configuration, without weights.

    Attributes:
      converted: The module.
      body: Name of the part that gives the final sequence; the rest of the module makes logits.
      output: Class of what that part gives.
      layers: Names of the weights of linear layers in its blocks, in torch's order.
      in_out: Those of them that torch has as [in, out].
      parts: Names of all modules inside.
      shapes: Shapes and types of all tensors.
      stored: Names of those that a checkpoint holds.
      sizes: See `TorchSizes`.
      function: Class and configuration, in words.
      takes_mask: Whether it takes a mask of what each token sees; others see that from positions.
    """

    converted: Converted
    body: str
    output: type
    layers: tuple[str, ...]
    in_out: frozenset[str]
    parts: frozenset[str]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    stored: frozenset[str]
    sizes: TorchSizes
    function: str
    takes_mask: bool = False

    def __repr__(self) -> str:
        return self.function


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

    def hidden(self, params: Params, tokens: Tokens, segments: Tokens) -> Hidden:
        """Returns the final sequence, [b, t, d], which `logits` takes; see `Decoder.hidden`."""

        def run(module: Any, tokens: Any, positions: Any, mask: Any = None) -> Any:
            found: list[Any] = []
            body = module.get_submodule(self.network.body)
            with self._adapted(module, params), _hooked(body, lambda _, __, out: found.append(out)):
                if self.rematerialise:
                    _rematerialised(module, self.network.converted.what)
                given = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
                module(**given, use_cache=False)
            return found[0][0]

        masks = [_hiding(segments, self.dtype)] if self.network.takes_mask else []
        return self._run(run, params, tokens, _positions(segments), *masks)

    def plain(self, params: Params, tokens: Tokens) -> Hidden:
        """Returns the final sequence of whole rows as the class itself counts their places."""

        def run(module: Any, tokens: Any) -> Any:
            found: list[Any] = []
            body = module.get_submodule(self.network.body)
            with _hooked(body, lambda _, __, out: found.append(out)):
                module(input_ids=tokens, use_cache=False)
            return found[0][0]

        return self._run(run, params, tokens)

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

    def abstract_params(self) -> Params:
        """Returns shapes and types of all parameters; no memory is taken."""
        return {**self.network.shapes, **self.abstract_adapter()}

    def abstract_adapter(self) -> Params:
        """Returns shapes and types of the adapter's parameters alone."""
        if self.adapter is None:
            return {}
        found = {}
        for name in self.targeted():
            shape = self.network.shapes[name].shape
            num_in, num_out = shape if name in self.network.in_out else shape[::-1]
            shapes = {"lora_a": (num_in, self.adapter.rank), "lora_b": (self.adapter.rank, num_out)}
            for matrix, size in shapes.items():
                path = f"{self.layer_of(name)}/{matrix}"
                found[path] = jax.ShapeDtypeStruct(size, jnp.float32)
        return found

    def targeted(self) -> list[str]:
        """Returns the weights that the adapter changes, as PEFT takes names: whole, or the end."""
        targets = () if self.adapter is None else self.adapter.targets
        if set(targets) == set(TARGETS):
            return list(self.network.layers)
        return [
            name
            for name in self.network.layers
            if any(f".{self.layer_of(name)}".endswith(f".{target}") for target in targets)
        ]

    @property
    def target_names(self) -> tuple[str, ...]:
        """The last parts of the names of layers, and whole names."""
        layers = list(map(self.layer_of, self.network.layers))
        return tuple(dict.fromkeys([*map(_last, layers), *layers]))

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

    def is_in_out(self, path: str) -> bool:
        """Whether torch has the weight of a linear layer as [in, out]; most classes do not."""
        return path in self.network.in_out

    def is_prunable(self, path: str) -> bool:
        """Every linear layer of the blocks; not embeddings, the head or norms."""
        return path in self.network.layers

    def module_order(self, path: str) -> int:
        """Sort key of prunable paths: torch's order of modules."""
        return self.network.layers.index(path)

    def _run(self, run: Callable[..., Any], params: Params, *args: Array) -> Array:
        tensors = {name: params[name] for name in self.network.shapes}
        with precision_of(self.dtype):
            output, changed = self.network.converted.call(run, tensors, *map(jnp.asarray, args))
        if changed:
            raise expect.InputError(
                f"{self.network.converted.what}: changes {expect.listed(changed)} while it is "
                "evaluated; expected a function of tokens and weights."
            )
        return output

    @contextlib.contextmanager
    def _adapted(self, module: Any, params: Params) -> Iterator[None]:
        """Makes linear layers add scale * (x @ lora_a) @ lora_b to what they give, in float32."""
        if self.adapter is None:
            yield
            return
        env, scale = environment(), self.adapter.scale

        def changed(layer: str, _: Any, args: Any, output: Any) -> Any:
            x, y = args[0].jax(), output.jax()
            lora_a, lora_b = params[f"{layer}/lora_a"], params[f"{layer}/lora_b"]
            with precision_of("float32"):
                change = (x.astype(jnp.float32) @ lora_a) @ lora_b
            return env.j2t_iso((y + change * scale).astype(y.dtype))

        with contextlib.ExitStack() as stack:
            for name in self.targeted():
                layer = self.layer_of(name)
                hook = functools.partial(changed, layer)
                stack.enter_context(_hooked(module.get_submodule(layer), hook))
            yield


def _last(layer: str) -> str:
    return layer.rpartition(".")[2]


@contextlib.contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _positions(segments: Tokens) -> Int[Array, "b t"]:
    """Returns the place of every token in its sequence; 0 at padding.

    transformers takes a place that does not follow the one before for the start of a sequence that
    sees nothing of others, so that padding is seen by none.
    """
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    return jnp.where(segments == 0, 0, places - first)


def _hiding(segments: Tokens, dtype: str) -> Float[Array, "b 1 t t"]:
    """Returns what is added to the scores of attention: next to nothing is left of what is hidden.

    A token sees those of its sequence up to itself.
    """
    places = jnp.arange(segments.shape[1])
    is_seen = (segments[:, :, None] == segments[:, None, :]) & (places[:, None] >= places)
    return jnp.where(is_seen, 0, jnp.finfo(DTYPES[dtype]).min)[:, None].astype(DTYPES[dtype])


def _rematerialised(module: Any, what: str) -> None:
    """Makes the blocks of a module compute their activations again for a gradient."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    env = environment()
    array_class = optional("torchax", what).tensor.Tensor

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
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

    blocks = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not blocks:
        raise expect.InputError(f"lora.rematerialise: {what} has no blocks for it; expected False.")
    for block in blocks:
        block.forward = wrapped(block.forward)  # `Converted.call` puts things right


def converted_decoder(
    folder: Path, config: Any, dtype: str, mesh: Mesh | None, name: str, why: str
) -> tuple[TorchDecoder, Params]:
    """Reads a model of transformers.

    Args:
      folder: Hugging Face model folder with safetensors.
      config: Its configuration of transformers.
      dtype: In `DTYPES`.
      mesh: Devices that the parameters are spread over; None: the default device.
      name: For messages.
      why: For that of a missing torch: what computes the model, and why.
    Raises:
      ValueError: torch is not there; no causal language model, or one that is not dense, or not of
        text alone; weights that do not fit exactly or are not finite; one that cannot be converted;
        one where tokens see later ones, padding, or other sequences of their row.
    """
    torch = optional("torch", f"{name}: {why}")
    environment()  # before weights are read: the extra may be missing
    module = _loaded(torch, folder, config, dtype)
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    sizes = TorchSizes.of(config)._replace(vocab_size=len(embedding.weight), tied=tied)
    settings = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    words = json.dumps(settings, sort_keys=True, default=str)
    function = f"{type(module).__name__} {'tied ' if tied else ''}{words}"
    stored = frozenset(module.state_dict())
    parts = dict(module.named_modules())
    for part in parts.values():
        _fix_rotations(part)
    # transformers' own
    in_out = {f"{name}.weight" for name, part in parts.items() if type(part).__name__ == "Conv1D"}
    not_finite: list[str] = []

    def placed(key: str, tensor: Any) -> Array:
        value = _as_numpy(torch, tensor)
        if key in stored and not np.isfinite(value.astype(np.float32)).all():
            not_finite.append(key)
        where = None if mesh is None or mesh.size == 1 else sharding_of(mesh, key, value.shape)
        return place(value, where)

    converted = Converted(module, name, placed, _WAYS_OUT)
    params, converted.tensors = converted.tensors, {}
    if not_finite:
        problem = {f"tensors with NaN or infinity in {dtype}": not_finite}
        raise expect.InputError(f"{folder}: {expect.problems(problem)}.")
    architecture = _ARCHITECTURES.get((name, function, dtype))
    if architecture is None:
        shapes = {key: jax.ShapeDtypeStruct(p.shape, p.dtype) for key, p in params.items()}
        layers = tuple(prunable_layers(converted))
        network = CausalNetwork(
            converted=converted,
            body="",
            output=tuple,
            layers=layers,
            in_out=frozenset(in_out) & {*layers},
            parts=frozenset(parts),
            shapes=shapes,
            stored=stored,
            sizes=sizes,
            function=function,
        )
        body, output = _body(network)
        network = dataclasses.replace(network, body=body, output=output)
        architecture = TorchDecoder(network, dtype)
        leaks = _leaks(architecture, params)
        # a mask of ours would make any model causal, and undo windows
        if leaks and _LATER not in leaks and getattr(config, "sliding_window", None) is None:
            told = dataclasses.replace(network, takes_mask=True)
            with contextlib.suppress(expect.InputError):
                leaks = _leaks(dataclasses.replace(architecture, network=told), params)
                architecture = dataclasses.replace(architecture, network=told)
        if leaks:
            words, far = next(iter(leaks.items()))
            raise expect.InputError(
                f"{name}: what it makes of a sequence depends on {words} (it moves by {far:.1g} of "
                "its norm); expected a model where tokens see those before them in their sequence, "
                "whose places are counted from 0."
            )
        _ARCHITECTURES[name, function, dtype] = architecture
    return architecture, params


# Programs are compiled for an architecture: loading a model again compiles none anew.
_ARCHITECTURES: dict[tuple[str, str, str], TorchDecoder] = {}


def check_dense_text(config: Any, folder: Path) -> None:
    """Raises ValueError for mixtures of experts, and for models of more than text."""
    where = f"{folder / 'config.json'}: model_type {config.model_type}"
    has_experts = getattr(config, "is_moe", True)  # few say so
    for key, value in _flat(config.to_dict()):
        if (
            has_experts
            and "experts" in key
            and "_per_" not in key
            and isinstance(value, int)
            and value > 1
        ):
            raise expect.InputError(
                f"{where}: a mixture of experts ({key} {value}); expected a dense model."
            )
        if key in config.sub_configs and _OTHER_THAN_TEXT.search(key):
            raise expect.InputError(
                f"{where}: a multimodal model ({key}); expected a language model alone."
            )


def _flat(settings: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _flat(value)


def _loaded(torch: Any, folder: Path, config: Any, dtype: str) -> Any:
    """Returns a module of torch with exactly the weights of a folder."""
    transformers: Any = optional("transformers", str(folder))
    tensors = stored_tensors(folder, only_floats=False)

    def is_buffer(key: str) -> bool:
        shape = tensors[key].shape if key in tensors else ()
        is_mask = len(shape) == 4 and shape[:2] == (1, 1)
        return matches(key, _BUFFERS) or (is_mask and matches(key, _MASKS))

    problem = f"{folder}: transformers could not load it"
    with expect.refusing(problem, Exception, shown=expect.first_line), quiet():
        module, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, with names
            output_loading_info=True,
        )
    problems = {
        "tensors without a place": sorted(
            key for key in info["unexpected_keys"] if not is_buffer(key)
        ),
        "tensors that are missing": sorted(info["missing_keys"]),
        "tensors of another shape": [
            f"{key} {tuple(found)}, not {tuple(expected)}"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    if found := expect.problems({k: v for k, v in problems.items() if v}):
        raise expect.InputError(f"{folder}: {found}.")
    return module


def _fix_rotations(part: Any) -> None:
    """Makes a rotary embedding keep its frequencies, which depend on the length of a batch.

    Up to the length in `TorchSizes` they are the same.
    """
    kinds = getattr(part, "rope_type", None)
    if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        part.forward = functools.partial(inspect.unwrap(type(part).forward), part)


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    """Returns a copy: the tensor's memory may be that of a mapped file."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy's own types have none
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16).copy()
    return tensor.numpy().copy()


def _body(network: CausalNetwork) -> tuple[str, type]:
    """Returns which part gives the final sequence, the outermost model inside, and as what."""
    from transformers import PreTrainedModel

    called: list[tuple[str, type]] = []

    def noted(name: str, _: Any, __: Any, output: Any) -> None:
        called.append((name, type(output)))

    def run(module: Any, tokens: Any, positions: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name, part in module.named_modules():
                if name and isinstance(part, PreTrainedModel):
                    stack.enter_context(_hooked(part, functools.partial(noted, name)))
            return module(input_ids=tokens, position_ids=positions, use_cache=False).logits

    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def traced(tensors: Params, tokens: Array) -> Any:
        return network.converted.call(run, tensors, tokens, tokens)

    jax.eval_shape(traced, dict(network.shapes), ids)
    if not called or not hasattr(called[-1][1], "last_hidden_state"):
        raise expect.InputError(
            f"{network.converted.what}: no part of it gives a final sequence for its head."
        )
    return called[-1]  # the outermost one ends last


def _leaks(architecture: TorchDecoder, params: Params) -> dict[str, float]:
    """Returns what a token sees of others than those before it in its sequence.

    Computed in single precision, whatever the model is in: rounding would hide little.

    Returns:
      In words, and by how much the final sequence moves, relative to its norm.
    """
    numbers, size = np.random.default_rng(0), architecture.config.vocab_size
    tokens = np.tile(numbers.integers(0, size, 12, np.int32), (4, 1))
    first, segments = tokens[0, :8].copy(), np.ones((4, 12), np.int32)
    tokens[1, 8:] = (tokens[1, 8:] + 1 + numbers.integers(0, size - 1)) % size
    tokens[2:, 4:] = first
    tokens[2, :4], segments[2, :4] = 0, 0
    segments[3, 4:] = 2
    exact = dataclasses.replace(architecture, dtype="float32")

    @jax.jit
    def differences(params: Params, tokens: Array, segments: Array) -> Array:
        is_float = {name: jnp.issubdtype(leaf.dtype, jnp.floating) for name, leaf in params.items()}
        wide = {n: leaf.astype(jnp.float32) if is_float[n] else leaf for n, leaf in params.items()}
        hidden = exact.hidden(wide, tokens, segments)
        logits = exact.logits(wide, hidden[0])
        alone = exact.plain(wide, tokens[:1])[0, :8]
        some = jnp.stack([hidden[1, :8], hidden[2, 4:], hidden[3, 4:], alone]) - hidden[0, :8]
        far = jnp.linalg.norm(some, axis=(1, 2)) / jnp.linalg.norm(hidden[0, :8])
        return jnp.where(jnp.isfinite(logits).all(), far, jnp.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some ask for 64 bits where they count places
        found = fetch(differences(params, *over_devices(params, (tokens, segments))))
    where = (_LATER, "padding before it", "another sequence of its row", "how places are counted")
    return {
        words: float(far) for words, far in zip(where, found, strict=True) if not far <= _TOLERANCE
    }
