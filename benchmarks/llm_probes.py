"""Tokens x probes per second of a Llama-like model, against torch's, in turns in one process.

python -m benchmarks.llm_probes [--width=512] [--depth=4] [--length=512] [--rows=4]
    [--family=llama|qwen3] [--dtypes=float32,bfloat16] [--attentions=,cudnn,cudnn_causal] [--torch]
    [--converted] [--json=FILE]

By the decoder, by transformers' own class in torch and, with --converted, by that class converted.

Random weights; `--paper=meta-llama/Meta-Llama-3-8B --depth=4` takes the sizes of one of the models
of the paper, with fewer blocks (0: all of them). Prints medians, the share of the rate of a matrix
product, and the memory of the first program by the plan and, on devices that count it, measured.
--notorch leaves torch out, which holds a copy of the weights for every probe. Needs the test extra.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import peers
from benchmarks.measuring import measured, peak, peak_bytes_in_use, print_rows, save, traced_with
from dlc_jax.encoders.causal_model import CausalModel
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.encoders.known_models import PAPER_MODELS
from dlc_jax.encoders.language_model import load_language_model
from dlc_jax.masking import PathSpec, exact_thresholds, prunable_paths
from dlc_jax.planning.decoder_memory import Scoring
from dlc_jax.planning.programs import count_flops
from dlc_jax.probes.text import _probe_losses
from dlc_jax.types import Params, by_path

_PAPER = flags.DEFINE_enum("paper", None, list(PAPER_MODELS), "Model whose sizes are used.")
_WIDTH = flags.DEFINE_integer("width", 512, "Features of the residual stream; heads have 64.")
_FAMILY = flags.DEFINE_enum("family", "llama", ["llama", "qwen3"], "Whose blocks, of which class.")
_DEPTH = flags.DEFINE_integer("depth", 4, "Blocks.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "Tokens.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows per batch.")
_PROBES = flags.DEFINE_integer("num_probes", 2, "Per call.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Types of weights and activations.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Medians are of so many.")
_ATTENTIONS = flags.DEFINE_list("attentions", [""], "As JAX names them; '': its own choice.")
_TORCH = flags.DEFINE_boolean("torch", True, "Whether torch takes part.")
_CONVERTED = flags.DEFINE_boolean("converted", False, "Whether the converted class takes part.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")


def sizes() -> DecoderConfig:
    """Returns the sizes asked for."""
    if _PAPER.value:
        config = PAPER_MODELS[_PAPER.value]
        return dataclasses.replace(config, windows=config.windows[: _DEPTH.value or None])
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
        norms_heads=_FAMILY.value == "qwen3",
    )


def random_params(architecture: Architecture) -> Params:
    """Returns weights drawn on the device, the largest first: drawing takes memory besides."""
    leaves, tree = jax.tree.flatten(architecture.abstract_params())
    found: list[jax.Array] = [jnp.zeros(())] * len(leaves)
    for number in sorted(range(len(leaves)), key=lambda number: -leaves[number].size):
        leaf = leaves[number]
        found[number] = _drawn(jax.random.key(number), leaf.shape, leaf.dtype)
    return jax.tree.unflatten(tree, jax.block_until_ready(found))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


class Program(NamedTuple):
    """The compiled program with what its calls share.

    Attributes:
      architecture: Sizes and type.
      prunable: Paths of the weights that are masked.
      arguments: What every call takes.
    """

    architecture: CausalModel
    prunable: tuple[str, ...]
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, architecture: CausalModel, params: Params, vocab_size: int) -> Program:
        prunable = prunable_paths(params, architecture.is_prunable, architecture.module_order)
        num_weights = sum(by_path(params)[path].size for path in prunable)
        counts = PathSpec("linear", num_probes=_PROBES.value).counts(num_weights).chosen
        thresholds = jax.device_put(exact_thresholds(params, prunable, None, counts))
        generator = np.random.default_rng(0)
        shape = (_ROWS.value, _LENGTH.value)
        tokens = jnp.asarray(generator.integers(0, vocab_size, shape), jnp.int32)
        arguments = (params, None, thresholds, tokens, jnp.ones_like(tokens))
        return cls(architecture, prunable, arguments)

    def call(self, attention: str) -> Callable[[], None]:
        """Returns one call of the program, compiled with that attention."""

        def program(*arguments: Any) -> jax.Array:
            return _probe_losses.__wrapped__(self.architecture, self.prunable, *arguments)

        with traced_with(attention=attention):
            compiled = jax.jit(program).lower(*self.arguments).compile()

        def call() -> None:
            compiled(*self.arguments).block_until_ready()

        return call


def flops(program: Program, config: DecoderConfig) -> int:
    """Returns the floating-point operations of one call."""
    params, _, _, tokens, _ = program.arguments
    blocks = count_flops(program.architecture.hidden, params, tokens, jnp.ones_like(tokens))
    return (blocks + 2 * tokens.size * config.width * config.vocab_size) * _PROBES.value


def torch_module(config: DecoderConfig, dtype: str) -> Any:
    """Returns a model of transformers of these sizes."""
    peers.import_timm()  # sets up torchvision, without which transformers does not load
    import torch
    import transformers

    kind = {"llama": "Llama", "qwen3": "Qwen3"}[_FAMILY.value]
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    module = getattr(transformers, f"{kind}ForCausalLM")(settings)
    return module.to(getattr(torch, dtype)).eval()


def converted(config: DecoderConfig, dtype: str) -> Callable[[], None]:
    """Returns one call of the program of the class of transformers, converted."""
    with tempfile.TemporaryDirectory() as folder:
        torch_module(config, dtype).save_pretrained(folder)
        model = load_language_model(folder, dtype=dtype, converted=True)
    return Program.of(model.architecture, model.params, config.vocab_size).call("")


def torchs(config: DecoderConfig, dtype: str) -> Callable[[], None]:
    """Returns the same by transformers."""
    import torch

    model = torch_module(config, dtype).to(peers.device())
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
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": [], "memory": []}
    for dtype in _DTYPES.value:
        start = time.perf_counter()
        architecture = Architecture(config, dtype)
        program = Program.of(architecture, random_params(architecture), config.vocab_size)
        best, num_flops = peak(dtype), flops(program, config)
        setup = {"dtype": dtype, "setup_s": time.perf_counter() - start}
        contenders: dict[str, Callable[[], Callable[[], None]]] = {
            f"dlc_jax {dtype}{f', attention {name}' if name else ''}": functools.partial(
                program.call, name
            )
            for name in _ATTENTIONS.value
        }
        if _CONVERTED.value:
            contenders[f"converted {dtype}"] = functools.partial(converted, config, dtype)
        if _TORCH.value:
            contenders[f"torch {dtype}"] = functools.partial(torchs, config, dtype)
        for known in measured(contenders, _ROUNDS.value):
            if "plan" not in setup:  # after the first program alone
                setup |= memory(config, dtype)
            rows = known.rows(
                lambda some, flops=num_flops, best=best: {
                    "rate": num_tokens / some,
                    "share": flops / some / best,
                }
            )
            now = {"rows": found["rows"] + rows, "memory": [*found["memory"], setup]}
            save(_JSON.value, found | now)
        found |= now
        print(setup)
        print_rows(rows)


def memory(config: DecoderConfig, dtype: str) -> dict[str, float | None]:
    """Returns gigabytes by the plan, and the most that was held so far."""
    num_tokens = _ROWS.value * _LENGTH.value
    plan = Scoring(config, dtype, "l1", _PROBES.value, num_tokens, _LENGTH.value, 1).plan()
    held = peak_bytes_in_use()
    return {"plan": plan.num_bytes / 1e9, "measured": None if held is None else held / 1e9}


if __name__ == "__main__":
    app.run(main)
