"""A decoder with its weights and its tokenizer, from a Hugging Face folder, read strictly."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dlc_jax import expect
from dlc_jax.encoders import causal_model, decoder, rotations
from dlc_jax.encoders.encoder import fingerprint_of
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
    refuse,
    stored_tensors,
)
from dlc_jax.encoders.torch_checkpoint import check_dense_text, converted_decoder
from dlc_jax.encoders.torch_decoder import TorchDecoder, TorchSizes
from dlc_jax.files.json_files import read_json
from dlc_jax.files.libraries import fetching
from dlc_jax.preprocess.tokens import check_vocabulary, tokenising
from dlc_jax.types import Params, by_path, path_name

DECODER = "decoder"  # as `encoder.name`
CONVERTED_DECODER = "decoder:converted"  # also where there is a hand-written one
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_WITH_LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3_text")  # attention of every block
_WITH_NORMED_HEADS = ("qwen3", "gemma3_text")
# Settings that give projections a bias, and the families where transformers looks at them
_BIASES = {
    "attention_bias": (causal_model.TARGETS[:4], ("llama", "qwen3", "gemma2", "gemma3_text")),
    "mlp_bias": (causal_model.TARGETS[4:], ("llama",)),
}
Sizes = decoder.DecoderConfig | TorchSizes
_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.jinja")
_OLD_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# not consolidated.safetensors: the same weights once more, in Mistral's own layout
MODEL_FILES = ("*.json", "model*.safetensors", *_TOKENIZER_FILES)
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
    (rf"{_BLOCK}/attn/(\w+)/bias", rf"{_LAYER}.self_attn.\2.bias", AS_IT_IS),
    (rf"{_BLOCK}/attn/([qk]_norm)/scale", rf"{_LAYER}.self_attn.\2.weight", AS_IT_IS),
    (rf"{_BLOCK}/mlp/(\w+)/kernel", rf"{_LAYER}.mlp.\2.weight", LINEAR),
    (rf"{_BLOCK}/mlp/(\w+)/bias", rf"{_LAYER}.mlp.\2.bias", AS_IT_IS),
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


def longest_sequence(config: Sizes, name: str, asked: int | None) -> int:
    """Returns how many tokens of a sequence a model is to see.

    Args:
      config: Sizes of the model.
      name: Name of the model, for messages.
      asked: None: 2048, or the model's limit if it is lower.
    Raises:
      ValueError: it is over the model's limit.
    """
    if asked is None:
        return min(2048, config.max_length)
    expect.at_least("max_length", asked, 2)
    expect.at_most(f"max_length, of {name}", asked, config.max_length)
    return asked


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder with its weights.

    Attributes:
      params: Pytree of arrays, as `Decoder` nests it, or a flat dictionary by torch's names.
      architecture: A pure function of them.
      folder: Where configuration, weights and tokenizer are.
      name: For messages and provenance.
      door: What computes it and why, in words.
    """

    params: Params = dataclasses.field(repr=False)
    architecture: decoder.Architecture | TorchDecoder
    folder: Path
    name: str
    door: str = ""

    @property
    def config(self) -> Sizes:
        return self.architecture.config

    def with_adapter(self, adapter: causal_model.Adapter, weights: Params) -> LanguageModel:
        """Returns the model with low-rank changes.

        Args:
          adapter: Which and how large.
          weights: Weights of the adapter, nested as `Architecture.abstract_adapter` is.
        Raises:
          ValueError: it has an adapter.
        """
        self.check_has_no_adapter()
        architecture = self.architecture.with_adapter(adapter)
        params = causal_model.joined(self.params, weights)
        return dataclasses.replace(self, params=params, architecture=architecture)

    def check_has_no_adapter(self) -> None:
        """Raises ValueError if it has one: a second would have to be added to it first."""
        if self.architecture.adapter is not None:
            raise expect.InputError(
                f"{self.name}: has an adapter, expected a model without one; write_merged gives a "
                "model that another can be added to."
            )

    def check_tokens(self, named: Iterable[tuple[str, Sequence[int] | np.ndarray]]) -> None:
        """Raises ValueError for a token without an embedding; see `check_vocabulary`."""

        def text_of(token: int) -> str | None:
            try:
                return self.tokenizer.convert_ids_to_tokens(token)
            except Exception:  # no tokenizer, or an id that it does not know
                return None

        check_vocabulary(named, self.config.vocab_size, text_of)

    def module_order(self, path: str) -> Any:
        """Sort key of prunable paths: torch's order of modules."""
        return self.architecture.module_order(path)

    def is_prunable(self, path: str) -> bool:
        """Every linear layer of the blocks; not the embedding, the head or a norm."""
        return self.architecture.is_prunable(path)

    def stored_names(self, paths: Iterable[str]) -> dict[str, Stored]:
        """Returns how parameters are stored in a Hugging Face checkpoint; others are left out."""
        if isinstance(self.architecture, TorchDecoder):
            stored = self.architecture.network.stored
            return {path: Stored(path, AS_IT_IS) for path in paths if path in stored}
        return stored_names(self.architecture.config, paths)

    def max_length(self, asked: int | None = None) -> int:
        """Returns the longest sequence in tokens; ValueError if it is over the model's limit."""
        return longest_sequence(self.config, self.name, asked)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; ValueError if the folder has none that can be read."""
        return _tokenizer_in(self.folder)

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the files of the tokenizer, chat templates included."""
        digest = hashlib.sha256()
        names = (*_TOKENIZER_FILES, *_OLD_TOKENIZER)
        for path in sorted({path for name in names for path in self.folder.glob(name)}):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every parameter."""
        return fingerprint_of(self.architecture, self.params)


def load_language_model(
    weights: str,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    converted: bool = False,
) -> LanguageModel:
    """Loads a dense causal language model.

    Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 are computed by one decoder, without torch. All
    others are transformers' own classes, converted from torch; this needs the extra `any`. `door`
    of the model says which it was, and why.

    Args:
      weights: A folder in Hugging Face format, a hub id such as `mistralai/Mistral-7B-v0.3`, or
        `demo:tiny-llama`, the bundled one.
      dtype: `bfloat16`, `float16` or `float32`.
      mesh: Devices, from `make_mesh`; the weights are spread over its axis `fsdp`. None: the
        default device.
      converted: Whether to convert transformers' own class also where the decoder would do.
    Raises:
      ValueError: nothing there, the hub cannot be reached, a model that is not dense, not causal or
        not of text alone, quantised weights, or weights that do not fit exactly.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama")
      >>> model.config.vocab_size, model.config.max_length, len(model.tokenizer)
      (4096, 1024, 4096)
    """
    expect.one_of("dtype", dtype, causal_model.DTYPES)
    folder = model_folder(weights)
    door = door_of(folder, converted=converted)
    if door.config is None:
        given = _transformers_config(folder)
        found = converted_decoder(folder, given, dtype, mesh, weights, door.words)
        return LanguageModel(found[1], found[0], folder, weights, door.words)
    own = decoder.Architecture(door.config, dtype)
    return LanguageModel(read_params(folder, own, mesh), own, folder, weights, door.words)


class Door(NamedTuple):
    """What computes a model.

    Attributes:
      config: Sizes and switches of the decoder; None: transformers' own class, converted.
      sizes: What consumers need to know.
      words: For messages, with the reason.
    """

    config: decoder.DecoderConfig | None
    sizes: Sizes
    words: str


def door_of(folder: Path, *, converted: bool = False) -> Door:
    """Decides what computes the model of a folder, from `config.json` and headers alone.

    Raises:
      ValueError: see `load_language_model`.
    """
    kind, reason = _raw_config(folder).get("model_type"), "as asked for"
    if not converted:
        try:
            config = read_config(folder)
            return Door(config, config, f"{kind}, computed by the decoder here")
        except NotInDecoderError as error:
            reason = f"since the decoder here does not compute it: {error}"
    words = f"{kind}, computed by transformers' own class, converted from torch, {reason}"
    given = _transformers_config(folder)
    check_dense_text(given, folder)
    with _refusing(folder / "config.json"):  # such as that of a model of another kind
        return Door(None, TorchSizes.of(given), words)


def load_tokenizer(weights: str) -> Any:
    """Loads a model's tokenizer without the model.

    Raises:
      ValueError: see `load_language_model`; no tokenizer that can be read.
    """
    return _tokenizer_in(model_folder(weights))


def _tokenizer_in(folder: Path) -> Any:
    with tokenising(f"{folder}: has no tokenizer that can be read"):
        return transformers_library().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def model_folder(weights: str) -> Path:
    """Returns the folder of a model, fetched where it is a hub id; see `load_language_model`."""
    if weights.startswith("demo:"):
        expect.one_of("weights", weights, ["demo:tiny-llama"])
        return Path(str(resources.files("dlc_jax.datasets") / "instructions_sample" / "model"))
    folder = Path(weights).expanduser()
    if folder.is_dir():
        for file in folder.iterdir():  # reading another kind of file might never end
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise expect.InputError(f"{file}: not a regular file.")
        return folder
    if not expect.is_hub_id(weights):
        raise expect.InputError(
            f"weights: no folder {weights!r}, and that is no hub id (owner/name) either."
        )
    with fetching(
        f"weights: {weights!r} is neither a local folder nor could it be",
        "Without network: on a machine that has it, download the repository into a folder, bring "
        "it here and give that folder.",
    ) as hub:
        return Path(hub.snapshot_download(weights, allow_patterns=list(MODEL_FILES)))


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


def read_config(folder: Path) -> decoder.DecoderConfig:
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


def read_config_alone(folder: Path) -> decoder.DecoderConfig:
    """Reads `config.json` of a model folder that may have no weights.

    Raises:
      ValueError: no such file, sizes that are out of range, quantised weights, or a model this
        decoder does not compute exactly: another family, another activation or rotary scaling,
        attention in both directions.
    """
    path = folder / "config.json"
    _check_known(f"{path}: model_type", _raw_config(folder).get("model_type"), FAMILIES)
    with _refusing(path):
        return _decoder_config(_transformers_config(folder), str(path))


class NotInDecoderError(expect.InputError):
    """A model that the decoder does not compute, though transformers may."""


def _check_known(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises NotInDecoderError where a switch has a value that the decoder does not have."""
    try:
        expect.one_of(name, value, known)
    except expect.InputError as error:
        raise NotInDecoderError(str(error)) from error


def _refusing(path: Path) -> AbstractContextManager[None]:
    """Turns all errors into those of a configuration; transformers refuses in many ways."""

    def on_one_line(error: Exception) -> str:  # the field first, what was wrong on other lines
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    return expect.refusing(str(path), Exception, shown=on_one_line, end="")


def _raw_config(folder: Path) -> Mapping[str, Any]:
    """Returns what `config.json` of a model folder says, of plain weights and possible sizes."""
    path = folder / "config.json"
    if not path.is_file():
        raise expect.InputError(f"{path}: not there; expected a Hugging Face model folder.")
    raw = read_json(path)
    _check_loadable(folder, path, raw)
    for name in _SIZES:  # one out of range would take all memory as soon as it is used
        if (given := raw.get(name)) is not None:
            largest = _MOST_BLOCKS if name == "num_hidden_layers" else _LARGEST_SIZE
            is_per_block = isinstance(given, list) and raw.get("model_type") not in FAMILIES
            for size in given if is_per_block else [given]:
                expect.integer(f"{path}: {name}", size, 1)
                expect.at_most(f"{path}: {name}", size, largest)
    return raw


def _transformers_config(folder: Path) -> Any:
    """Returns the configuration of transformers, where `_raw_config` finds nothing wrong."""
    with _refusing(folder / "config.json"):
        library = transformers_library()
        return library.AutoConfig.from_pretrained(folder, trust_remote_code=False)


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


def _decoder_config(config: Any, source: str) -> decoder.DecoderConfig:
    """Translates a transformers configuration of one of `FAMILIES`.

    Args:
      config: `LlamaConfig`, `Qwen3Config`, `Gemma3TextConfig` and so on.
      source: What messages call it.
    Raises:
      ValueError: see `read_config`.
    """
    # transformers takes a mistral with layer_types for a ministral
    kind = config.model_type
    _check_known(f"{source}: model_type, as transformers reads it", kind, FAMILIES)
    config.standardize_rope_params()  # once more, as its rotary embeddings do
    is_gemma, is_gemma3 = config.model_type.startswith("gemma"), config.model_type == "gemma3_text"
    rope, windowed_rope = config.rope_parameters, None
    if is_gemma3:
        rope, windowed_rope = rope["full_attention"], rope["sliding_attention"]
        kind = windowed_rope.get("rope_type", "default")
        _check_known(f"{source}: rope_type of sliding_attention", kind, ("default",))
    if getattr(config, "use_bidirectional_attention", None):
        raise expect.InputError(
            f"{source}: use_bidirectional_attention is on, which this decoder does not do."
        )
    if not getattr(config, "is_causal", True):
        raise expect.InputError(f"{source}: is_causal is off, which this decoder does not do.")
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1:
        raise NotInDecoderError(f"{source}: partial_rotary_factor {factor}; expected 1.")
    activation = config.hidden_activation if is_gemma else config.hidden_act
    _check_known(f"{source}: activation", activation, decoder.ACTIVATIONS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = config.query_pre_attn_scalar if is_gemma else head_dim
    if config.num_attention_heads % config.num_key_value_heads or head_dim % 2:
        raise expect.InputError(
            f"{source}: {config.num_attention_heads} heads of {head_dim} features and "
            f"{config.num_key_value_heads} key-value heads; expected a multiple of the latter, and "
            "an even number of features."
        )
    positive = {"rms_norm_eps": config.rms_norm_eps, "query_pre_attn_scalar": scale}
    positive["rope_theta"] = rope.get("rope_theta")
    if windowed_rope is not None:
        positive["rope_theta of sliding_attention"] = windowed_rope.get("rope_theta")
    for name, value in positive.items():
        expect.at_least(f"{source}: {name}", value, 0, exclusive=True)
    return decoder.DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        mlp_width=config.intermediate_size,
        windows=_windows(config, source),
        max_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(config, rope, source),
        attention_scale=scale**-0.5,
        # transformers reads Gemma 3's and does not use it
        attention_cap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        final_cap=config.final_logit_softcapping if is_gemma else None,
        activation=activation,
        sandwich=is_gemma,
        offset_norm=is_gemma,
        scale_embedding=is_gemma,
        tied=bool(config.tie_word_embeddings),
        norms_heads=config.model_type in _WITH_NORMED_HEADS,
        biases=_biases(config, source),
        window_rope_theta=None if windowed_rope is None else float(windowed_rope["rope_theta"]),
    )


def _windows(config: Any, source: str) -> tuple[int | None, ...]:
    """Returns how far back each block sees; None: all."""
    window = None if config.model_type == "llama" else config.sliding_window
    if config.model_type not in _WITH_LAYER_TYPES:
        return (window,) * config.num_hidden_layers
    windows = {"sliding_attention": window, "full_attention": None}
    for kind in config.layer_types:
        _check_known(f"{source}: layer_types", kind, windows)
    if window is None and "sliding_attention" in config.layer_types:
        raise expect.InputError(
            f"{source}: layer_types has sliding_attention, sliding_window is None; expected a "
            "number."
        )
    return tuple(windows[kind] for kind in config.layer_types)


def _biases(config: Any, source: str) -> tuple[str, ...]:
    """Returns which projections have a bias in transformers."""
    if config.model_type == "qwen2":
        return ("q_proj", "k_proj", "v_proj")
    found: tuple[str, ...] = ()
    for switch, (names, families) in _BIASES.items():
        if getattr(config, switch, None):
            if config.model_type not in families:
                raise expect.InputError(
                    f"{source}: {switch} is on, which transformers does not do in a model of type "
                    f"{config.model_type}."
                )
            found += names
    return found


def _rope_scaling(config: Any, parameters: dict[str, Any], source: str) -> rotations.Scaling | None:
    kind = parameters.get("rope_type", "default")
    _check_known(f"{source}: rope_type", kind, ("default", "linear", "llama3", "yarn"))
    if kind == "default":
        return None

    def name(key: str) -> str:
        return f"{source}: {key} of rope_parameters"

    factor: Any = parameters.get("factor")
    original: Any = parameters.get("original_max_position_embeddings")
    if kind != "linear":
        expect.at_least(name("original_max_position_embeddings"), original, 0, exclusive=True)
    if factor is None and kind == "yarn":  # it follows from the two lengths
        factor = config.max_position_embeddings / original
    expect.at_least(name("factor"), factor, 1)
    if kind == "linear":
        return rotations.LinearScaling(float(factor))
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        expect.at_least(name("low_freq_factor"), low, 0, exclusive=True)
        expect.at_least(name("high_freq_factor"), high, low, exclusive=True)
        return rotations.RopeScaling(float(factor), float(low), float(high), original)
    most, fewest = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    for key, value in (("beta_fast", most), ("beta_slow", fewest)):
        expect.at_least(name(key), value, 0, exclusive=True)
    if parameters["rope_theta"] == 1:
        raise expect.InputError(f"{name('rope_theta')} 1 with yarn; expected another.")
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if (value := parameters.get(key)) is not None:
            expect.at_least(name(key), value, 0)
    return rotations.YarnScaling(
        factor=float(factor),
        most_turns=float(most),
        fewest_turns=float(fewest),
        original_length=original,
        amplitude=_yarn_amplitude(float(factor), parameters),
        whole=bool(config.rope_parameters.get("truncate", True)),
    )


def _yarn_amplitude(factor: float, parameters: dict[str, Any]) -> float:
    """Returns the factor on queries and keys, as transformers derives it where none is stated."""
    if (stated := parameters.get("attention_factor")) is not None:
        return float(stated)

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    of_one, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(of_one) / grown(of_all) if of_one and of_all else grown(1.0)


def read_params(
    folder: Path, architecture: decoder.Architecture, mesh: Mesh | None = None
) -> Params:
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
    refuse(folder, problems)
    params, not_finite = read_tensors(expected, names, tensors, mesh)
    refuse(folder, {f"tensors with NaN or infinity in {architecture.dtype}": not_finite})
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], shapes)


def stored_names(config: decoder.DecoderConfig, paths: Iterable[str]) -> dict[str, Stored]:
    """Returns how each path is stored in a Hugging Face checkpoint."""
    return names_of(_NAMES + (_SANDWICH_NORMS if config.sandwich else _PLAIN_NORMS), paths)
