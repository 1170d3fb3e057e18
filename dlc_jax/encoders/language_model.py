"""A decoder with its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dlc_jax import expect
from dlc_jax.encoders.architecture import DTYPES, Architecture, joined
from dlc_jax.encoders.decoder import Adapter, DecoderConfig
from dlc_jax.encoders.encoder import fingerprint_of
from dlc_jax.encoders.huggingface import read_config, read_params, transformers_library
from dlc_jax.files.hub import fetching
from dlc_jax.preprocess.tokens import check_vocabulary, tokenising
from dlc_jax.types import Params

DECODER = "decoder"  # as `encoder.name`
_USUAL_LENGTH = 2048  # tokens
_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.jinja")
_OLD_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# not consolidated.safetensors: the same weights once more, in Mistral's own layout
MODEL_FILES = ("*.json", "model*.safetensors", *_TOKENIZER_FILES)


def longest_sequence(config: DecoderConfig, name: str, asked: int | None) -> int:
    """Returns how many tokens of a sequence a model is to see.

    Args:
      config: Sizes and switches of the model.
      name: Name of the model, for messages.
      asked: None: 2048, or the model's limit if it is lower.
    Raises:
      ValueError: it is over the model's limit.
    """
    if asked is None:
        return min(_USUAL_LENGTH, config.max_length)
    expect.at_least("max_length", asked, 2)
    expect.at_most(f"max_length, of {name}", asked, config.max_length)
    return asked


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder with its weights.

    Attributes:
      params: Pytree of arrays, as `Decoder` nests it.
      architecture: A pure function of them.
      folder: Where configuration, weights and tokenizer are.
      name: For messages and provenance.
    """

    params: Params = dataclasses.field(repr=False)
    architecture: Architecture
    folder: Path
    name: str

    @property
    def config(self) -> DecoderConfig:
        return self.architecture.config

    def with_adapter(self, adapter: Adapter, weights: Params) -> LanguageModel:
        """Returns the model with low-rank changes.

        Args:
          adapter: Which and how large.
          weights: Weights of the adapter, nested as `Architecture.abstract_adapter` is.
        Raises:
          ValueError: it has an adapter.
        """
        self.check_has_no_adapter()
        params = joined(self.params, weights)
        architecture = self.architecture.with_adapter(adapter)
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

    module_order = None  # decides in official mode only, which language models have none of

    @staticmethod
    def is_prunable(path: str) -> bool:
        """Every linear projection of the blocks; not the embedding, the head or a norm."""
        return path.startswith("blocks/") and path.endswith("/kernel")

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
) -> LanguageModel:
    """Loads a Llama, Mistral or Gemma 2 model.

    Args:
      weights: A folder in Hugging Face format, a hub id such as `mistralai/Mistral-7B-v0.3`, or
        `demo:tiny-llama`, the bundled one.
      dtype: `bfloat16`, `float16` or `float32`.
      mesh: Devices, from `make_mesh`; the weights are spread over its axis `fsdp`. None: the
        default device.
    Raises:
      ValueError: nothing there, the hub cannot be reached, another architecture, or weights that do
        not fit exactly.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama")
      >>> model.config.width, model.config.max_length, len(model.tokenizer)
      (192, 1024, 4096)
    """
    expect.one_of("dtype", dtype, DTYPES)
    folder = model_folder(weights)
    architecture = Architecture(read_config(folder), dtype)
    params = read_params(folder, architecture, mesh)
    return LanguageModel(params, architecture, folder, weights)


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
