"""Hugging Face model folders -> `LanguageModel`, tensor by tensor and strictly."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh

from dlc_jax import expect
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.decoder import ACTIVATIONS, DecoderConfig, RopeScaling
from dlc_jax.encoders.stored_tensors import (
    AS_IT_IS,
    INDEX,
    LINEAR,
    WHOLE,
    Stored,
    Table,
    are_equal,
    misfits,
    names_of,
    read_tensors,
    stored_tensors,
)
from dlc_jax.files.json_files import read_json
from dlc_jax.types import Params, by_path, path_name


@functools.cache
def transformers_library() -> ModuleType:
    """Returns transformers, also where torchvision is installed but cannot be imported.

    Configurations and tokenizers need no torchvision, but transformers imports it where it is
    found; one that was built for another torch would stop it.
    """
    os.environ["RUST_BACKTRACE"] = "0"  # a tokenizer that panics is refused in a line
    try:
        importlib.import_module("torchvision")
    except Exception:  # it is not there, or fails in one of many ways
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # not to be found
    try:
        import transformers

        transformers.utils.is_torchvision_available()  # remembers what it finds
        return transformers
    finally:
        if sys.modules["torchvision"] is None:
            del sys.modules["torchvision"]


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

_BLOCK, _LAYER = r"blocks/(\d+)", r"model.layers.\1"
_NAMES: Table = (
    (r"embedding/embedding", _EMBEDDING, AS_IT_IS),
    (r"norm/scale", "model.norm.weight", AS_IT_IS),
    (r"head/kernel", _HEAD, LINEAR),
    (rf"{_BLOCK}/attn/(\w+)/kernel", rf"{_LAYER}.self_attn.\2.weight", LINEAR),
    (rf"{_BLOCK}/mlp/(\w+)/kernel", rf"{_LAYER}.mlp.\2.weight", LINEAR),
    (rf"{_BLOCK}/attn_norm/scale", rf"{_LAYER}.input_layernorm.weight", AS_IT_IS),
)
_AFTER_ATTENTION = rf"{_LAYER}.post_attention_layernorm.weight"
_PLAIN_NORMS: Table = ((rf"{_BLOCK}/mlp_norm/scale", _AFTER_ATTENTION, AS_IT_IS),)
_SANDWICH_NORMS: Table = (
    (rf"{_BLOCK}/attn_norm_after/scale", _AFTER_ATTENTION, AS_IT_IS),
    (rf"{_BLOCK}/mlp_norm/scale", rf"{_LAYER}.pre_feedforward_layernorm.weight", AS_IT_IS),
    (rf"{_BLOCK}/mlp_norm_after/scale", rf"{_LAYER}.post_feedforward_layernorm.weight", AS_IT_IS),
)
_IGNORED = (r".*rotary_emb\.inv_freq",)  # what old checkpoints hold besides weights


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json` of a model folder, and from its weights whether the head is tied.

    As in transformers, a stored head that differs from a tied embedding is a head of its own.

    Raises:
      ValueError: see `read_config_alone`; weights with another number of blocks.
    """
    config = read_config_alone(folder)
    if not any((folder / name).is_file() for name in (WHOLE, INDEX)):
        return config
    tensors = stored_tensors(folder)
    found = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    if found != config.depth:
        names = f"; its tensors are {expect.listed(sorted(tensors))}" if not found else ""
        raise expect.InputError(
            f"{folder}: config.json has num_hidden_layers {config.depth}, the weights have "
            f"{found}{names}."
        )
    if config.tied and {_EMBEDDING, _HEAD} <= tensors.keys():
        return dataclasses.replace(config, tied=are_equal(tensors[_EMBEDDING], tensors[_HEAD]))
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
        raise expect.InputError(f"{path}: not there; expected a Hugging Face model folder.")
    raw = read_json(path)
    expect.one_of(f"{path}: model_type", raw.get("model_type"), FAMILIES)
    _check_loadable(folder, path, raw)
    for name in _SIZES:  # one out of range would take all memory as soon as it is used
        if (size := raw.get(name)) is not None:
            expect.integer(f"{path}: {name}", size)
            expect.at_least(f"{path}: {name}", size, 1)
            largest = _MOST_BLOCKS if name == "num_hidden_layers" else _LARGEST_SIZE
            expect.at_most(f"{path}: {name}", size, largest)
    try:
        library = transformers_library()
        config = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return _decoder_config(config, str(path))
    except expect.InputError:
        raise
    except Exception as error:  # what transformers refuses, it refuses in many ways
        said = " ".join(str(error).split())[:300]  # the field first, what was wrong on other lines
        raise expect.InputError(f"{path}: {type(error).__name__}: {said}") from error


def _check_loadable(folder: Path, path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError where transformers would load something else than the plain weights."""
    if (quantised := raw.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise expect.InputError(
            f"{path}: quantization_config: the weights are quantised ({method}); expected those of "
            "a model that is not."
        )
    if (weights := raw.get("transformers_weights")) is not None:
        raise expect.InputError(
            f"{path}: transformers_weights {weights!r}; expected weights under their usual names."
        )
    if (folder / "adapter_config.json").exists():
        raise expect.InputError(
            f"{folder}: holds an adapter (adapter_config.json) beside a model; expected a folder "
            "for each, or a model with the adapter merged into its weights."
        )


def _decoder_config(config: Any, source: str) -> DecoderConfig:
    """Translates a transformers configuration of Llama, Mistral or Gemma 2.

    Args:
      config: `LlamaConfig`, `MistralConfig` or `Gemma2Config`.
      source: What messages call it.
    Raises:
      ValueError: see `read_config`.
    """
    is_gemma = config.model_type == "gemma2"
    _check_plain(config, source)
    activation = config.hidden_activation if is_gemma else config.hidden_act
    expect.one_of(f"{source}: activation", activation, ACTIVATIONS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = config.query_pre_attn_scalar if is_gemma else head_dim
    if config.num_attention_heads % config.num_key_value_heads or head_dim % 2:
        raise expect.InputError(
            f"{source}: {config.num_attention_heads} heads of {head_dim} features and "
            f"{config.num_key_value_heads} key-value heads; expected a multiple of the latter, and "
            "an even number of features."
        )
    positive = {"rms_norm_eps": config.rms_norm_eps, "query_pre_attn_scalar": scale}
    for name, value in (positive | {"rope_theta": config.rope_parameters["rope_theta"]}).items():
        expect.at_least(f"{source}: {name}", value, 0, exclusive=True)
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
            raise expect.InputError(f"{source}: {switch} is on, which this decoder does not do.")
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if factor != 1:
        raise expect.InputError(f"{source}: partial_rotary_factor {factor}; expected 1.")


def _windows(config: Any) -> tuple[int | None, ...]:
    """Returns how far back each block sees; None: all."""
    window = None if config.model_type == "llama" else config.sliding_window
    if config.model_type == "gemma2":
        return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
    return (window,) * config.num_hidden_layers


def _rope_scaling(parameters: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = parameters.get("rope_type", "default")
    expect.one_of(f"{source}: rope_type", kind, ("default", "llama3"))
    if kind == "default":
        return None
    return RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_length=int(parameters["original_max_position_embeddings"]),
    )


def read_params(folder: Path, architecture: Architecture, mesh: Mesh | None = None) -> Params:
    """Reads the weights of a model folder, one tensor at a time.

    Args:
      folder: With `model.safetensors`, or shards and their index.
      architecture: Architecture made of what `read_config` gives, without an adapter.
      mesh: Devices that the parameters are spread over; None: the default device.
    Raises:
      ValueError: a file that is missing or damaged, a tensor without a place, a parameter without
        a tensor, another shape, NaN or infinite values.
    """
    config, shapes = architecture.config, architecture.abstract_params()
    expected, tensors = by_path(shapes), stored_tensors(folder)
    names = stored_names(config, expected)
    if config.tied and _EMBEDDING not in tensors:  # then transformers uses the head for both
        names["embedding/embedding"] = Stored(_HEAD, AS_IT_IS)
    ignored = [*_IGNORED, re.escape(_HEAD)] if config.tied else _IGNORED
    unused, missing, misshaped = misfits(expected, names, tensors, ignored)
    other_shapes = []
    for path in misshaped:
        name, axes = names[path]
        shape = expected[path].shape
        other_shapes.append(f"{name} {tensors[name].shape}, not {shape[::-1] if axes else shape}")
    problems = {
        "tensors without a place": sorted(unused),
        "tensors that are missing": [names[path].name for path in missing],
        "tensors of another shape": sorted(other_shapes),
    }
    _refuse(folder, problems)
    params, not_finite = read_tensors(expected, names, tensors, mesh)
    _refuse(folder, {f"tensors with NaN or infinity in {architecture.dtype}": not_finite})
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], shapes)


def stored_names(config: DecoderConfig, paths: Iterable[str]) -> dict[str, Stored]:
    """Returns how each path is stored in a Hugging Face checkpoint."""
    return names_of(_NAMES + (_SANDWICH_NORMS if config.sandwich else _PLAIN_NORMS), paths)


def _refuse(folder: Path, problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError with everything that is wrong, if anything is."""
    if found := expect.problems(problems):
        raise expect.InputError(f"{folder}: {found}.")
