"""Hugging Face model folders -> `LanguageModel`, tensor by tensor and strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import checks
from dlc_jax.distributed import place
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.decoder import ACTIVATIONS, DecoderConfig, RopeScaling
from dlc_jax.encoders.stored_tensors import (
    StoredTensor,
    are_equal,
    has_weights,
    num_blocks,
    read_tensor,
    stored_tensors,
)
from dlc_jax.encoders.transformers_library import transformers_library
from dlc_jax.encoders.weights import opened
from dlc_jax.files.json_files import read_json
from dlc_jax.types import Params, by_path, path_name

FAMILIES = ("llama", "mistral", "gemma2")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MOST_BLOCKS, _LARGEST_SIZE = 256, 2**24  # published models have 126 blocks at most
# Sizes in `config.json`; those that may be missing or null have a default.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)

# Path here -> name in a checkpoint; the first full match counts.
_NAMES = (
    (r"embedding/embedding", _EMBEDDING),
    (r"norm/scale", "model.norm.weight"),
    (r"head/kernel", _HEAD),
    (r"blocks/(\d+)/attn/(\w+)/kernel", r"model.layers.\1.self_attn.\2.weight"),
    (r"blocks/(\d+)/mlp/(\w+)/kernel", r"model.layers.\1.mlp.\2.weight"),
    (r"blocks/(\d+)/attn_norm/scale", r"model.layers.\1.input_layernorm.weight"),
)
_PLAIN_NORMS = (
    (r"blocks/(\d+)/mlp_norm/scale", r"model.layers.\1.post_attention_layernorm.weight"),
)
_SANDWICH_NORMS = (
    (r"blocks/(\d+)/attn_norm_after/scale", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks/(\d+)/mlp_norm/scale", r"model.layers.\1.pre_feedforward_layernorm.weight"),
    (r"blocks/(\d+)/mlp_norm_after/scale", r"model.layers.\1.post_feedforward_layernorm.weight"),
)
_IGNORED = (r".*rotary_emb\.inv_freq",)  # what old checkpoints hold besides weights


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json` of a model folder, and from its weights whether the head is tied.

    As in transformers, a stored head that differs from a tied embedding is a head of its own.

    Raises:
      ValueError: see `read_config_alone`; weights with another number of blocks.
    """
    config = read_config_alone(folder)
    if not has_weights(folder):
        return config
    tensors = stored_tensors(folder)
    if (found := num_blocks(tensors)) != config.depth:
        names = f"; its tensors are {checks.listed(sorted(tensors))}" if not found else ""
        raise checks.InputError(
            f"{folder}: config.json has num_hidden_layers {config.depth}, the weights have "
            f"{found}{names}."
        )
    if config.tied and {_EMBEDDING, _HEAD} <= tensors.keys():
        return dataclasses.replace(config, tied=are_equal(tensors, (_EMBEDDING, _HEAD)))
    return config


def read_config_alone(folder: Path) -> DecoderConfig:
    """Reads `config.json` of a model folder that may have no weights.

    Raises:
      ValueError: no such file, sizes that are out of range, quantised weights, or a model this
        decoder does not compute exactly: another family, another activation or rotary scaling,
        biases, attention in both directions.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise checks.InputError(f"{path}: not there; expected a Hugging Face model folder.")
    raw = read_json(path)
    checks.one_of(f"{path}: model_type", raw.get("model_type"), FAMILIES)
    _check_loadable(folder, path, raw)
    _check_sizes(path, raw)
    try:
        library = transformers_library()
        config = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return decoder_config(config, str(path))
    except checks.InputError:
        raise
    except Exception as error:  # what transformers refuses, it refuses in many ways
        said = " ".join(str(error).split())[:300]  # the field first, what was wrong on other lines
        raise checks.InputError(f"{path}: {type(error).__name__}: {said}") from error


def _check_loadable(folder: Path, path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError where transformers would load something else than the plain weights."""
    if (quantised := raw.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise checks.InputError(
            f"{path}: quantization_config: the weights are quantised ({method}); expected those of "
            "a model that is not."
        )
    if (weights := raw.get("transformers_weights")) is not None:
        raise checks.InputError(
            f"{path}: transformers_weights {weights!r}; expected weights under their usual names."
        )
    if (folder / "adapter_config.json").exists():
        raise checks.InputError(
            f"{folder}: holds an adapter (adapter_config.json) beside a model; expected a folder "
            "for each, or a model with the adapter merged into its weights."
        )


def _check_sizes(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError for a size that would take all memory as soon as it is used."""
    for name in _SIZES:
        if (size := raw.get(name)) is not None:
            checks.integer(f"{path}: {name}", size)
            checks.at_least(f"{path}: {name}", size, 1)
            largest = _MOST_BLOCKS if name == "num_hidden_layers" else _LARGEST_SIZE
            checks.at_most(f"{path}: {name}", size, largest)


def decoder_config(config: Any, source: str = "config") -> DecoderConfig:
    """Translates a transformers configuration of Llama, Mistral or Gemma 2.

    Args:
      config: `LlamaConfig`, `MistralConfig` or `Gemma2Config`.
      source: What messages call it.
    Raises:
      ValueError: see `read_config`.
    """
    checks.one_of(f"{source}: model_type", config.model_type, FAMILIES)
    is_gemma = config.model_type == "gemma2"
    _check_plain(config, source)
    activation = config.hidden_activation if is_gemma else config.hidden_act
    checks.one_of(f"{source}: activation", activation, ACTIVATIONS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = config.query_pre_attn_scalar if is_gemma else head_dim
    if config.num_attention_heads % config.num_key_value_heads or head_dim % 2:
        raise checks.InputError(
            f"{source}: {config.num_attention_heads} heads of {head_dim} features and "
            f"{config.num_key_value_heads} key-value heads; expected a multiple of the latter, and "
            "an even number of features."
        )
    positive = {"rms_norm_eps": config.rms_norm_eps, "query_pre_attn_scalar": scale}
    for name, value in (positive | {"rope_theta": config.rope_parameters["rope_theta"]}).items():
        checks.at_least(f"{source}: {name}", value, 0, exclusive=True)
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        mlp_width=config.intermediate_size,
        windows=_windows(config),
        max_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_scaling=_rope_scaling(config.rope_parameters, source),
        attention_scale=scale**-0.5,
        attention_cap=config.attn_logit_softcapping if is_gemma else None,
        final_cap=config.final_logit_softcapping if is_gemma else None,
        activation=activation,
        sandwich=is_gemma,
        offset_norm=is_gemma,
        scale_embedding=is_gemma,
        tied=bool(config.tie_word_embeddings),
    )


def _check_plain(config: Any, source: str) -> None:
    for switch in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(config, switch, None):
            raise checks.InputError(f"{source}: {switch} is on, which this decoder does not do.")
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if factor != 1:
        raise checks.InputError(f"{source}: partial_rotary_factor {factor}; expected 1.")


def _windows(config: Any) -> tuple[int | None, ...]:
    """Returns how far back each block sees; None: all."""
    if config.model_type == "gemma2":
        return tuple(
            config.sliding_window if kind == "sliding_attention" else None
            for kind in config.layer_types
        )
    window = config.sliding_window if config.model_type == "mistral" else None
    return (window,) * config.num_hidden_layers


def _rope_scaling(parameters: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = parameters.get("rope_type", "default")
    checks.one_of(f"{source}: rope_type", kind, ("default", "llama3"))
    if kind == "default":
        return None
    return RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_length=int(parameters["original_max_position_embeddings"]),
    )


def read_params(
    folder: Path,
    architecture: Architecture,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Params:
    """Reads the weights of a model folder, one tensor at a time.

    Args:
      folder: With `model.safetensors`, or shards and their index.
      architecture: Of what `read_config` gives, without an adapter.
      sharding_of: Path and shape -> where the parameter lies; None: on the default device.
    Raises:
      ValueError: a file that is missing or damaged, a tensor without a place, a parameter without
        a tensor, another shape, NaN or infinite values.
    """
    config, shapes = architecture.config, architecture.abstract_params()
    expected, tensors = by_path(shapes), stored_tensors(folder)
    names = torch_names(config, expected)
    if config.tied and _EMBEDDING not in tensors:  # then transformers uses the head for both
        names = {path: _HEAD if name == _EMBEDDING else name for path, name in names.items()}
    _check_tensors(folder, config, {names[path]: leaf for path, leaf in expected.items()}, tensors)
    params: dict[str, jax.Array] = {}
    not_finite = []
    with contextlib.ExitStack() as stack:
        paths = sorted({tensor.file for tensor in tensors.values()})
        shards = {path: stack.enter_context(opened(path)) for path in paths}
        for path, leaf in expected.items():
            name = names[path]
            value = read_tensor(shards[tensors[name].file], name)
            with np.errstate(over="ignore"):  # what float16 cannot hold is refused below
                value = value.astype(leaf.dtype)
            if not np.isfinite(value.astype(np.float32)).all():
                not_finite.append(name)
            value = value.T if path.endswith("kernel") else value  # torch's [out, in]
            where = None if sharding_of is None else sharding_of(path, leaf.shape)
            params[path] = place(value, where)
    _refuse(folder, {f"tensors with NaN or infinity in {architecture.dtype}": not_finite})
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], shapes)


def _check_tensors(
    folder: Path,
    config: DecoderConfig,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Raises ValueError unless every parameter has a tensor of its shape, and nothing is left."""
    ignored = [*_IGNORED, re.escape(_HEAD)] if config.tied else _IGNORED
    unused = [
        name
        for name in sorted(tensors.keys() - expected.keys())
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    missing = [name for name in expected if name not in tensors]
    misshaped = []
    for name in expected.keys() & tensors.keys():
        shape, wanted = tensors[name].shape, expected[name].shape
        if name != _EMBEDDING and not (config.tied and name == _HEAD):
            wanted = wanted[::-1]  # torch's [out, in]
        if shape != wanted:
            misshaped.append(f"{name} {shape}, not {wanted}")
    problems = {
        "tensors without a place": unused,
        "tensors that are missing": missing,
        "tensors of another shape": sorted(misshaped),
    }
    _refuse(folder, problems)


def torch_names(config: DecoderConfig, paths: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name of each path in a Hugging Face checkpoint."""
    table = _NAMES + (_SANDWICH_NORMS if config.sandwich else _PLAIN_NORMS)
    found = {}
    for path in paths:
        match, template = next(
            (match, template)
            for pattern, template in table
            if (match := re.fullmatch(pattern, path))
        )
        found[path] = match.expand(template)
    return found


def _refuse(folder: Path, problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError with everything that is wrong, if anything is."""
    shown = {what: checks.listed(which) for what, which in problems.items() if which}
    if found := "; ".join(f"{what}: {which}" for what, which in shown.items()):
        raise checks.InputError(f"{folder}: {found}.")
