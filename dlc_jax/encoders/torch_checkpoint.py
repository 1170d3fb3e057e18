"""Reads a causal language model of transformers, and tries what its tokens see."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dlc_jax import expect
from dlc_jax.distributed import fetch, over_devices, place, sharding_of
from dlc_jax.encoders.converted import prunable_layers
from dlc_jax.encoders.stored_tensors import matches, refuse, stored_tensors
from dlc_jax.encoders.torch_decoder import CausalNetwork, TorchDecoder, TorchSizes, flat, hooked
from dlc_jax.encoders.torch_functions import optional, quiet
from dlc_jax.encoders.torch_modules import Converted, environment
from dlc_jax.types import Params

_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "architectures", "use_cache"}
# Buffers that old checkpoints hold; of masks, those of shape [1, 1, n, n]
_BUFFERS = (
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r".*\.masked_bias",
    r".*\.position_ids",
)
_MASKS = (r".*\.(bias|causal_mask)",)
_OTHER_THAN_TEXT = re.compile("vision|image|audio|speech|video|vq")
_LATER = "later tokens"
# Relative distance of what should be equal; a token that is seen wrongly makes more
_TOLERANCE, _IN_HALF = 1e-3, 0.05
_LARGEST_COPY = 2 * 2**30  # bytes of weights in single precision
# Programs are compiled for an architecture: loading a model again compiles none anew.
_ARCHITECTURES: dict[tuple[str, str, str], TorchDecoder] = {}


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
      ValueError: torch is not there; no causal language model; weights that do not fit exactly or
        are not finite; one that cannot be converted; one where tokens see later ones, padding, or
        other sequences of their row.
    """
    torch = optional("torch", f"{name}: {why}")
    environment()  # before weights are read: the extra may be missing
    module = _loaded(torch, folder, config, dtype)
    stored = frozenset(module.state_dict())
    facts = _facts_of(module, config, stored)
    not_finite: list[str] = []

    def placed(key: str, tensor: Any) -> Array:
        value = _as_numpy(torch, tensor)
        if key in stored and not np.isfinite(value.astype(np.float32)).all():
            not_finite.append(key)
        where = None if mesh is None or mesh.size == 1 else sharding_of(mesh, key, value.shape)
        return place(value, where)

    converted = Converted(module, name, placed, "Take another variant of the model.")
    params, converted.tensors = converted.tensors, {}
    refuse(folder, {f"tensors with NaN or infinity in {dtype}": not_finite})
    key = (name, facts["function"], dtype)
    if key not in _ARCHITECTURES:
        shapes = {key: jax.ShapeDtypeStruct(p.shape, p.dtype) for key, p in params.items()}
        body, output = _body(converted, shapes)
        network = CausalNetwork(
            converted=converted,
            body=body,
            output=output,
            layers=tuple(prunable_layers(converted)),
            shapes=shapes,
            **facts,
        )
        _ARCHITECTURES[key] = _tried(TorchDecoder(network, dtype), params, config)
    return _ARCHITECTURES[key], params


def _facts_of(module: Any, config: Any, stored: frozenset[str]) -> dict[str, Any]:
    """Returns what `CausalNetwork` says of a module that still has its weights, by field."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    settings = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    settings_text = json.dumps(settings, sort_keys=True, default=str)
    parts = dict(module.named_modules())
    for part in parts.values():
        _fix_rotations(part)
    again = (name for name, part in parts.items() if isinstance(part, GradientCheckpointingLayer))
    return {
        "parts": frozenset(parts),
        "stored": stored,
        "blocks": tuple(again),
        "sizes": TorchSizes.of(config)._replace(vocab_size=len(embedding.weight), tied=tied),
        "function": f"{type(module).__name__} {'tied ' if tied else ''}{settings_text}",
    }


def check_dense_text(config: Any, folder: Path) -> None:
    """Raises ValueError for mixtures of experts, and for models of more than text."""
    where = f"{folder / 'config.json'}: model_type {config.model_type}"
    may_have_experts = getattr(config, "is_moe", True)  # few state it; the others by their number
    for key, value in flat(config.to_dict()):
        # experts per token, or per group, are settings of those that have any
        is_number = may_have_experts and "experts" in key and "_per_" not in key
        if is_number and isinstance(value, int) and value > 1:
            raise expect.InputError(
                f"{where}: a mixture of experts ({key} {value}); expected a dense model."
            )
        if key in config.sub_configs and _OTHER_THAN_TEXT.search(key):
            raise expect.InputError(
                f"{where}: a multimodal model ({key}); expected a language model alone."
            )


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
        "tensors that are not floating-point, as of quantised weights": sorted(
            key for key, tensor in tensors.items() if not tensor.is_float and not is_buffer(key)
        ),
        "tensors without a place": sorted(
            key for key in info["unexpected_keys"] if not is_buffer(key)
        ),
        "tensors that are missing": sorted(info["missing_keys"]),
        "tensors of another shape": [
            f"{key} {tuple(found)}, not {tuple(expected)}"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    refuse(folder, problems)
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


def _body(converted: Converted, shapes: Params) -> tuple[str, type]:
    """Returns which part gives the final sequence, the outermost model inside, and as what."""
    from transformers import PreTrainedModel

    called: list[tuple[str, type]] = []

    def noted(name: str, _: Any, __: Any, output: Any) -> None:
        called.append((name, type(output)))

    def run(module: Any, tokens: Any, positions: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name, part in module.named_modules():
                if name and isinstance(part, PreTrainedModel):
                    stack.enter_context(hooked(part, functools.partial(noted, name)))
            return module(input_ids=tokens, position_ids=positions, use_cache=False).logits

    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def traced(tensors: Params, tokens: Array) -> Any:
        return converted.call(run, tensors, tokens, tokens)

    jax.eval_shape(traced, dict(shapes), ids)
    if not called or not hasattr(called[-1][1], "last_hidden_state"):
        raise expect.InputError(
            f"{converted.what}: no part of it gives a final sequence for its head."
        )
    return called[-1]  # the outermost one ends last


def _tried(architecture: TorchDecoder, params: Params, config: Any) -> TorchDecoder:
    """Returns the model, perhaps with masks of ours.

    Raises:
      ValueError: a token sees others than those before it in its sequence.
    """
    leaks = _leaks(architecture, params)
    # a mask of ours would make any model causal, and undo windows
    if leaks and _LATER not in leaks and getattr(config, "sliding_window", None) is None:
        network = dataclasses.replace(architecture.network, takes_mask=True)
        with_masks = dataclasses.replace(architecture, network=network)
        with contextlib.suppress(expect.InputError):
            leaks = _leaks(with_masks, params)
            architecture = with_masks
    for words, far in leaks.items():
        raise expect.InputError(
            f"{architecture.network.what}: what it makes of a sequence depends on {words} "
            f"(it moves by {far:.1g} of its norm); expected a model where tokens see those before "
            "them in their sequence, whose places are counted from 0."
        )
    return architecture


def _leaks(architecture: TorchDecoder, params: Params) -> dict[str, float]:
    """Returns what a token sees of others than those before it in its sequence.

    Computed in single precision, since half precision hides small ones, unless a copy of the
    weights would be large.

    Returns:
      In words, and by how much the final sequence moves, relative to its norm.
    Raises:
      ValueError: logits that are not finite.
    """
    numbers, size = np.random.default_rng(0), architecture.config.vocab_size
    tokens = np.tile(numbers.integers(0, size, 12, np.int32), (4, 1))
    first, segments = tokens[0, :8].copy(), np.ones((4, 12), np.int32)
    tokens[1, 8:] = (tokens[1, 8:] + 1 + numbers.integers(0, size - 1)) % size
    tokens[2:, 4:] = first
    tokens[2, :4], segments[2, :4] = 0, 0
    segments[3, 4:] = 2
    is_float = {name: jnp.issubdtype(leaf.dtype, jnp.floating) for name, leaf in params.items()}
    num_bytes = 4 * sum(leaf.size for name, leaf in params.items() if is_float[name])
    dtype = "float32" if num_bytes <= _LARGEST_COPY else architecture.dtype
    exact = dataclasses.replace(architecture, dtype=dtype)

    @jax.jit
    def differences(params: Params, tokens: Array, segments: Array) -> tuple[Array, Array]:
        if dtype != architecture.dtype:
            params = {n: leaf.astype(dtype) if is_float[n] else leaf for n, leaf in params.items()}
        hidden = exact.hidden(params, tokens, segments)
        logits = exact.logits(params, hidden[0])
        alone = exact.plain(params, tokens[:1])[0, :8].astype(jnp.float32)
        hidden = hidden.astype(jnp.float32)
        some = jnp.stack([hidden[1, :8], hidden[2, 4:], hidden[3, 4:], alone]) - hidden[0, :8]
        far = jnp.linalg.norm(some, axis=(1, 2)) / jnp.linalg.norm(hidden[0, :8])
        return far, jnp.isfinite(logits).all()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some ask for 64 bits where they count places
        found = differences(params, *over_devices(params, (tokens, segments)))
    distances, is_finite = map(fetch, found)
    if not is_finite:
        raise expect.InputError(
            f"{architecture.network.what}: its logits of twelve tokens are NaN or infinite; "
            "expected finite ones."
        )
    where = (_LATER, "padding before it", "another sequence of its row", "how places are counted")
    return {
        words: float(far)
        for words, far in zip(where, distances, strict=True)
        if not far <= (_TOLERANCE if dtype == "float32" else _IN_HALF)
    }
