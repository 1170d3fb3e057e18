"""Hugging Face model folders -> `LanguageModel`, tensor by tensor and strictly."""

from __future__ import annotations

import contextlib
import json
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
from dlc_jax.encoders.transformers_library import transformers_library
from dlc_jax.encoders.weights import opened
from dlc_jax.types import Params, by_path, path_name

FAMILIES = ("llama", "mistral", "gemma2")
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"

# Path here -> name in a checkpoint; the first full match counts.
_NAMES = (
    (r"embedding/embedding", "model.embed_tokens.weight"),
    (r"norm/scale", "model.norm.weight"),
    (r"head/kernel", "lm_head.weight"),
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
# What old checkpoints hold besides weights, and a head that repeats a tied embedding.
_IGNORED = (r".*rotary_emb\.inv_freq",)
_TIED_HEAD = "lm_head.weight"


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json` of a model folder.

    Raises:
      ValueError: no such file, or a model this decoder does not compute exactly: another family,
        another activation or rotary scaling, biases, attention in both directions.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise checks.InputError(f"{path}: not there; expected a Hugging Face model folder.")
    try:
        family = json.loads(path.read_bytes()).get("model_type")
        if family not in FAMILIES:
            expected = ", ".join(FAMILIES)
            raise checks.InputError(f"{path}: model_type {family!r}; expected {expected}.")
        return decoder_config(transformers_library().AutoConfig.from_pretrained(folder), str(path))
    except checks.InputError:
        raise
    except Exception as error:  # what transformers refuses, it refuses in many ways
        raise checks.InputError(f"{path}: {checks.first_line(error)}") from error


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
    expected = by_path(shapes)
    names = torch_names(config, expected)
    files = _files_of_tensors(folder)
    _check_names(folder, config, names, files)
    params: dict[str, jax.Array] = {}
    misshaped, not_finite = [], []
    with contextlib.ExitStack() as stack:
        shards = {path: stack.enter_context(opened(path)) for path in sorted(set(files.values()))}
        for path, leaf in expected.items():
            name = names[path]
            value = _tensor(shards[files[name]], name, is_kernel=path.endswith("kernel"))
            if value.shape != leaf.shape:
                misshaped.append(f"{name} {value.shape}, not {leaf.shape}")
                continue
            if not np.isfinite(value.astype(np.float32)).all():
                not_finite.append(name)
            where = None if sharding_of is None else sharding_of(path, leaf.shape)
            params[path] = place(value.astype(leaf.dtype), where)
    problems = {
        "tensors of another shape": misshaped,
        "tensors with NaN or infinity": not_finite,
    }
    _refuse(folder, problems)
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], shapes)


def _check_names(
    folder: Path, config: DecoderConfig, names: Mapping[str, str], files: Mapping[str, Path]
) -> None:
    """Raises ValueError unless every parameter has a tensor, and every tensor a parameter."""
    ignored = [*_IGNORED, re.escape(_TIED_HEAD)] if config.tied else _IGNORED
    unused = [
        name
        for name in sorted(files.keys() - names.values())
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    missing = [name for name in names.values() if name not in files]
    _refuse(folder, {"tensors without a place": unused, "tensors that are missing": missing})


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


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor."""
    index = folder / _INDEX
    if index.is_file():
        try:
            table = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise checks.InputError(f"{index}: not an index of tensors: {error!r}.") from error
        if lost := sorted({name for name in table.values() if not (folder / name).is_file()}):
            raise checks.InputError(
                f"{folder}: shards that {_INDEX} names are missing: {checks.listed(lost)}."
            )
        return {name: folder / file for name, file in table.items()}
    whole = folder / _WHOLE
    if not whole.is_file():
        raise checks.InputError(f"{folder}: neither {_WHOLE} nor {_INDEX} is there.")
    with opened(whole) as file:
        return dict.fromkeys(file.keys(), whole)


def _tensor(file: Any, name: str, *, is_kernel: bool) -> np.ndarray:
    """Reads one tensor to the host; torch's [out, in] -> [in, out]."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        value = np.asarray(file.get_tensor(name))
    return value.T if is_kernel else value


def _refuse(folder: Path, problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError with everything that is wrong, if anything is."""
    shown = [f"{what}: {checks.listed(which)}" for what, which in problems.items() if which]
    if found := "; ".join(shown):
        raise checks.InputError(f"{folder}: {found}.")
