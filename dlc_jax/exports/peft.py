"""Adapters in PEFT's format, and whole models with an adapter added, in Hugging Face format."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from dlc_jax import expect
from dlc_jax.distributed import fetch, on_every_device
from dlc_jax.encoders.causal_model import TARGETS, Adapter, is_called
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.encoders.stored_tensors import LINEAR, Stored, headers, misfits, read_tensors
from dlc_jax.exports.forms import grouped
from dlc_jax.types import by_path, path_name
from dlc_jax.workspace import artefacts, records

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_MATRICES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_SHARD_BYTES = 5 * 10**9
_LARGEST = 2**20  # rank or alpha; either is a few hundred at most
# Settings of PEFT that change what an adapter computes, and the values this decoder computes.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    "modules_to_save": (None, []),
    **dict.fromkeys(("layers_to_transform", "layer_replication"), (None,)),
    # others change the model's own weights as well
    "init_lora_weights": (True, False, "gaussian", None),
    "alora_invocation_tokens": (None,),
    **dict.fromkeys(("use_bdlora", "use_qalora"), (None, False)),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config"), (None,)),
}


def write_adapter(model: LanguageModel, folder: str | Path) -> None:
    """Writes the adapter of a model, as `PeftModel.from_pretrained` loads it.

    Args:
      model: With an adapter.
      folder: Made or replaced, whole or not at all.
    Raises:
      ValueError: the model has no adapter, or one with NaN or infinite values.
    Example:
      >>> import os
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> settings = dlc.LoraConfig(optimiser="adamw", learning_rate=0.01, warmup_steps=0)
      >>> tuned = dlc.finetune_lora(model, tokens, epochs=1, settings=settings).model
      >>> dlc.write_adapter(tuned, "adapter")
      >>> sorted(os.listdir("adapter"))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = model.architecture.adapter
    if adapter is None:
        raise expect.InputError(f"{model.name}: has no adapter; finetune_lora gives one.")
    weights = by_path(model.architecture.abstract_adapter())
    leaves = by_path(model.params)
    names = _adapter_names(model, weights)
    tensors = {names[path].name: jnp.asarray(fetch(leaves[path]).T) for path in weights}
    for name, tensor in tensors.items():
        if not np.isfinite(np.asarray(tensor)).all():
            raise _not_finite(f"{model.name}: the adapter's {name}")
    config = {
        "base_model_name_or_path": model.name,
        "bias": "none",
        "fan_in_fan_out": any(map(model.architecture.is_in_out, leaves)),
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": model.architecture.target_modules(),
        "task_type": "CAUSAL_LM",
    }
    with artefacts.atomic_folder(Path(folder).expanduser()) as place:
        save_file(tensors, place / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        artefacts.write_json(place / ADAPTER_CONFIG, config)


def load_adapter(model: LanguageModel, folder: str | Path) -> LanguageModel:
    """Returns the model with the adapter of a PEFT folder.

    Args:
      model: Without an adapter.
      folder: With `adapter_model.safetensors` and `adapter_config.json`.
    Raises:
      ValueError: no adapter there, one that does more than LoRA on projections of the blocks,
        settings that are out of range, or weights that do not fit exactly or are not finite.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> settings = dlc.LoraConfig(optimiser="adamw", learning_rate=0.01, warmup_steps=0)
      >>> tuned = dlc.finetune_lora(model, tokens, epochs=1, settings=settings).model
      >>> dlc.write_adapter(tuned, "adapter")
      >>> again = dlc.load_adapter(model, "adapter")
      >>> np.array_equal(dlc.response_losses(again, tokens), dlc.response_losses(tuned, tokens))
      True
    """
    folder = Path(folder).expanduser()
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise expect.InputError(f"{path}: not there; expected a folder with a PEFT adapter.")
    records.check_beside_run(folder)
    adapter = _adapter_of(artefacts.read_json(path), path, model)
    shapes = model.architecture.with_adapter(adapter).abstract_adapter()
    found = _read_adapter(model, folder / ADAPTER_WEIGHTS, by_path(shapes))
    weights = jax.tree_util.tree_map_with_path(lambda place, _: found[path_name(place)], shapes)
    return model.with_adapter(adapter, on_every_device(model.params, weights))


def _not_finite(name: str) -> expect.InputError:
    return expect.InputError(f"{name} has NaN or infinite values; expected finite ones.")


def _read_adapter(
    model: LanguageModel, file: Path, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads exactly these tensors in these shapes; ValueError where the file has others."""
    names, tensors = _adapter_names(model, expected), headers(file)
    unused, missing, misshaped = misfits(expected, names, tensors)
    extra, lost = sorted(unused), sorted(names[path].name for path in missing)
    if extra or lost:
        raise expect.InputError(
            f"{file}: does not fit {model.name}: {len(lost)} tensors are missing "
            f"({expect.listed(lost)}), {len(extra)} have no place ({expect.listed(extra)})."
        )
    for path in expected:
        if path in misshaped:
            name, wanted = names[path].name, expected[path].shape[::-1]
            raise expect.InputError(f"{file}: {name} is {tensors[name].shape}, expected {wanted}.")
    found, not_finite = read_tensors(expected, names, tensors)
    for name in not_finite:
        raise _not_finite(f"{file}: {name}")
    return found


def _adapter_of(config: Mapping[str, Any], path: Path, model: LanguageModel) -> Adapter:
    for key, values in _PLAIN.items():
        if key in config and config[key] not in values:
            raise expect.InputError(f"{path}: {key} {config[key]!r}; expected {values[0]!r}.")
    try:
        rank, alpha, targets = (config[key] for key in ("r", "lora_alpha", "target_modules"))
    except KeyError as error:
        raise expect.InputError(f"{path}: has no {error}.") from error
    expect.integer(f"{path}: r", rank)
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        expect.at_least(f"{path}: {key}", value, 0, exclusive=True)
        expect.at_most(f"{path}: {key}", value, _LARGEST)
    if config.get("use_rslora"):  # it divides by the root of the rank
        alpha *= math.sqrt(rank)
    dropout = config.get("lora_dropout") or 0.0  # kept for who trains on
    expect.at_least(f"{path}: lora_dropout", dropout, 0)
    expect.at_most(f"{path}: lora_dropout", dropout, 1)
    names = model.architecture.target_names
    layers = sorted(_layer_names(model).values())
    changed = _called(layers, targets, f"{path}: target_modules")
    if (left_out := config.get("exclude_modules")) is not None:
        changed -= _called(layers, left_out, f"{path}: exclude_modules")
    if not changed:
        raise expect.InputError(
            f"{path}: target_modules {targets!r} names no linear layer in a block of {model.name}; "
            f"expected some of {expect.listed(names)}."
        )
    ends = {layer.rpartition(".")[2] for layer in changed}
    every = {layer for layer in layers if layer.rpartition(".")[2] in ends}
    # all of `TARGETS` would stand for the other layers, too
    if changed == every and (ends != set(TARGETS) or len(every) == len(layers)):
        changed = ends
    elif not all(map(model.architecture.has_target, changed)):
        raise expect.InputError(
            f"{path}: target_modules leaves out {expect.listed(sorted(every - changed))}; expected "
            "layers of a name in all blocks."
        )
    targets = tuple(sorted(changed, key=[*names, *layers].index))
    return Adapter(rank, float(alpha), targets, float(dropout))


def _called(layers: Collection[str], names: Any, where: str) -> set[str]:
    """Returns the layers that PEFT finds by names, which are whole or the end, or by a pattern."""
    if names == "all-linear":
        return {*layers}
    if isinstance(names, str):
        with expect.refusing(where, re.error):
            return {layer for layer in layers if re.fullmatch(names, layer)}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise expect.InputError(f"{where} {names!r}; expected a list of names, or a pattern.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise expect.InputError(f"{where}: {', '.join(repeated)} occur twice.")
    return {layer for layer in layers if any(is_called(layer, name) for name in names)}


def _adapter_names(model: LanguageModel, weights: Iterable[str]) -> dict[str, Stored]:
    """Returns how each path is stored in PEFT's file."""
    layers, names = _layer_names(model), {}
    for path in weights:
        layer, _, matrix = path.rpartition("/")
        name = f"base_model.model.{layers[layer]}.{_MATRICES[matrix]}.weight"
        names[path] = Stored(name, LINEAR)
    return names


def _layer_names(model: LanguageModel) -> dict[str, str]:
    """Returns PEFT's name of every linear layer in the blocks, by its path here."""
    weights = model.stored_names(filter(model.is_prunable, by_path(model.params)))
    layer_of = model.architecture.layer_of
    return {layer_of(path): stored.name.removesuffix(".weight") for path, stored in weights.items()}


def write_merged(model: LanguageModel, folder: str | Path) -> None:
    """Writes the model with its adapter added to the weights, as a Hugging Face folder.

    Configuration, tokenizer and other small files are copied from the model's own folder.

    Args:
      model: With an adapter or without one.
      folder: Made or replaced, whole or not at all.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> settings = dlc.LoraConfig(optimiser="adamw", learning_rate=0.01, warmup_steps=0)
      >>> tuned = dlc.finetune_lora(model, tokens, epochs=1, settings=settings).model
      >>> dlc.write_merged(tuned, "merged")
      >>> losses = dlc.response_losses(dlc.load_language_model("merged", dtype="float32"), tokens)
      >>> np.allclose(losses, dlc.response_losses(tuned, tokens), atol=1e-4)
      True
    """
    with artefacts.atomic_folder(Path(folder).expanduser()) as place:
        # all but the weights; the tokenizer's files differ from model to model
        for pattern in ("*.json", "*.model", "*.jinja", "tokenizer*"):
            for file in model.folder.glob(pattern):
                if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, place / file.name)
        config = artefacts.read_json(place / "config.json")
        config.pop("torch_dtype", None)  # as older versions called it
        config |= {"dtype": model.architecture.dtype, "tie_word_embeddings": model.config.tied}
        artefacts.write_json(place / "config.json", config)
        _write_shards(model, place)


def _write_shards(model: LanguageModel, place: Path) -> None:
    """Writes one file, or several with an index, never more than one in memory."""
    leaves = by_path(model.params)
    names = model.stored_names(p for p in leaves if p.rpartition("/")[2] not in _MATRICES)
    shards = list(grouped(list(names), lambda path: leaves[path].nbytes, _SHARD_BYTES, math.inf))
    weight_map: dict[str, str] = {}
    for number, paths in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names[path].name: _merged(model, leaves, path, names[path]) for path in paths}
        save_file(tensors, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(leaves[path].nbytes for path in names)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        artefacts.write_json(place / "model.safetensors.index.json", index)


def _merged(
    model: LanguageModel, leaves: Mapping[str, jax.Array], path: str, stored: Stored
) -> jax.Array:
    """Returns a tensor as torch has it; the change is added in float32."""
    value = jnp.asarray(fetch(leaves[path]))
    value = value.transpose(stored.axes) if stored.axes else value
    dtype = value.dtype
    layer = model.architecture.layer_of(path)
    if f"{layer}/lora_a" in leaves:
        assert model.architecture.adapter is not None
        lora_a, lora_b = (jnp.asarray(fetch(leaves[f"{layer}/{name}"])) for name in _MATRICES)
        with precision_of("float32"):
            change = lora_a @ lora_b * model.architecture.adapter.scale
        value = value.astype(jnp.float32)
        value += change if model.architecture.is_in_out(path) else change.T
    return value.astype(dtype)
