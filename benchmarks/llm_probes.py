"""Tokens x probes per second of a Llama-like model, against torch's, in turns in one process.

python -m benchmarks.llm_probes [--width=512] [--depth=4] [--length=512] [--rows=4]
    [--dtypes=float32,bfloat16] [--json=FILE]

Random weights; `--paper=llama3-8b --depth=4` takes the sizes of one of the paper's models, with
fewer blocks. Prints medians, and the share of the rate of a matrix product. Needs the test extra.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import peers
from benchmarks.measuring import measured, peak
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.decoder import DecoderConfig
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.encoders.paper_models import PAPER_MODELS
from dlc_jax.masking import exact_thresholds, path_counts, prunable_paths
from dlc_jax.planning.flops import count_flops
from dlc_jax.probes.responses import _probe_losses
from dlc_jax.types import by_path

_PAPER = flags.DEFINE_string("paper", None, f"One of {', '.join(PAPER_MODELS)}.")
_WIDTH = flags.DEFINE_integer("width", 512, "Of the residual stream; heads of 64.")
_DEPTH = flags.DEFINE_integer("depth", 4, "Blocks.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "Tokens.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row.")
_ROWS = flags.DEFINE_integer("rows", 4, "Of a batch.")
_PROBES = flags.DEFINE_integer("num_probes", 2, "Per call.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and activations.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")


def sizes() -> DecoderConfig:
    """Returns the sizes asked for."""
    if _PAPER.value:
        config = PAPER_MODELS[_PAPER.value]
        return dataclasses.replace(config, windows=config.windows[: _DEPTH.value])
    return DecoderConfig(
        vocab_size=_VOCABULARY.value,
        width=_WIDTH.value,
        num_heads=_WIDTH.value // 64,
        num_kv_heads=_WIDTH.value // 64,
        head_dim=64,
        mlp_width=_WIDTH.value * 11 // 4,
        windows=(None,) * _DEPTH.value,
        max_length=_LENGTH.value,
        norm_epsilon=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        attention_scale=0.125,
        attention_cap=None,
        final_cap=None,
        activation="silu",
        sandwich=False,
        offset_norm=False,
        scale_embedding=False,
        tied=False,
    )


def ours(config: DecoderConfig, dtype: str) -> tuple[Callable[[], None], int]:
    """Returns one call of the program, and its floating-point operations."""
    architecture = Architecture(config, dtype)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(0, 0.02, leaf.shape), leaf.dtype),
        architecture.abstract_params(),
    )
    prunable = prunable_paths(params, LanguageModel.is_prunable)
    num_weights = sum(by_path(params)[path].size for path in prunable)
    counts = path_counts(num_weights, num_probes=_PROBES.value).chosen
    thresholds = jax.device_put(exact_thresholds(params, prunable, None, counts))
    shape = (_ROWS.value, _LENGTH.value)
    tokens = jnp.asarray(generator.integers(0, config.vocab_size, shape), jnp.int32)
    lengths = jnp.full(_ROWS.value, _LENGTH.value, jnp.int32)

    def call() -> None:
        _probe_losses(
            architecture, prunable, params, None, thresholds, tokens, lengths, lengths // 4
        ).block_until_ready()

    flops = count_flops(architecture.hidden, params, tokens, jnp.ones_like(tokens))
    head = 2 * shape[0] * shape[1] * config.width * config.vocab_size
    return call, (flops + head) * _PROBES.value


def torchs(config: DecoderConfig, dtype: str) -> Callable[[], None]:
    """Returns the same by transformers."""
    peers.import_timm()  # sets up torchvision, without which transformers does not load
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
    )
    model = model.to(peers.device(), getattr(torch, dtype)).eval()
    weights = peers.masked_weights(model.model, 0.02, _PROBES.value)
    layers = peers.prunable_layers(model.model)
    shape = (_ROWS.value, _LENGTH.value)
    tokens = torch.randint(0, config.vocab_size, shape, device=peers.device())
    labels = tokens.clone()
    labels[:, : _LENGTH.value // 4] = -100

    def call() -> None:
        with torch.inference_mode():
            for masked in weights:
                for layer, weight in zip(layers, masked, strict=True):
                    layer.weight.data = weight
                logits = model(tokens).logits[:, :-1].float()
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
                )
        peers.synchronise()

    return call


def main(_: list[str]) -> None:
    config = sizes()
    num_tokens = _ROWS.value * _LENGTH.value * _PROBES.value
    print(f"{jax.devices()[0].device_kind}; {config.depth} blocks of {config.width}")
    print("| by | tokens x probes / s | share of peak |\n|---|---|---|", flush=True)
    rows = []
    for dtype in _DTYPES.value:
        call, flops = ours(config, dtype)
        seconds = measured({"dlc_jax": call, "torch": torchs(config, dtype)})
        best = peak(dtype)
        for by, some in seconds.items():
            row = {"by": f"{by} {dtype}", "rate": num_tokens / some, "share": flops / some / best}
            rows.append(row)
            print(f"| {row['by']} | {row['rate']:.0f} | {row['share']:.2f} |", flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
