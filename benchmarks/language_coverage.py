"""Which language models can be converted: dense causal models of transformers.

python -m benchmarks.language_coverage [--rows=runs/language_coverage.jsonl] [--only=FAMILY,...]
    [--num=N] [--limit_s=900]

Of every family a small network with random weights, seeded and large enough for every part to
matter, in safetensors. Each is loaded twice, with the configuration as version 5 of transformers
writes it and as version 4 did, through the converter even where the package has a decoder of its
own. Compared with torch, all in float32 on random tokens, relative 2-norms of the difference:

logits    of rows with padding on the left, and with padding on the right; at most 1e-5
losses    of responses with 25 % and 75 % of the weights of linear layers in the blocks zeroed, in
          torch by `prune.global_unstructured`; at most 1e-5
gradient  of the summed loss of responses, by the matrices of a random adapter of rank 4 on every
          linear layer of the blocks, in torch by PEFT; the worst matrix; at most 1e-5, or twice
          what torch's own float32 is off its float64
merged    logits of the model that `write_merged` writes, loaded by `AutoModelForCausalLM`, against
          PEFT's with that adapter; at most 1e-5

Each is a process of its own and one line of --rows; those that are there already are not run again.
Ends with a table in Markdown. Needs the test extra. Twenty minutes on two cores.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from benchmarks import coverage, peers

PARTS = ("logits", "losses", "gradient", "merged")
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_HEADS = {"head_dim": 12}
_WINDOW = {"sliding_window": 7}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Dense causal models of transformers, and settings that its defaults leave too large or unused
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": _WINDOW,
    "ministral": {**_ROPE, **_HEADS, **_MIXED},
    "ministral3": _HEADS,
    "qwen2": {**_MIXED, "use_sliding_window": True},
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": {**_HEADS, **_MIXED, "query_pre_attn_scalar": 12},
    "gemma3_text": {**_HEADS, **_MIXED, "query_pre_attn_scalar": 12},
    "vaultgemma": {**_HEADS, **_MIXED, "query_pre_attn_scalar": 12},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": _MIXED,
    "ctrl": {},
    "cwm": _MIXED,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": _MIXED,
    "falcon": {},
    "glm": _HEADS,
    "glm4": _HEADS,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 7},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {"rotary_dim": 4},
    "gemma4_text": {
        **_HEADS,
        **_MIXED,
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
    },
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoehybrid": {  # Granite 4 without experts
        "num_local_experts": 0,
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 80,
        "mamba_n_heads": 4,
    },
    "helium": _HEADS,
    "hunyuan_v1_dense": {**_ROPE, **_HEADS},
    "jais2": {},
    "minicpm3": _LATENT,
    "modernbert-decoder": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": _MIXED,
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "seed_oss": _HEADS,
    "smollm3": {"no_rope_layers": [0, 1]},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": _WINDOW,
    "youtu": _LATENT,
    "biogpt": {},
    "bloom": {},
    "mpt": {},
    "opt": {"word_embed_proj_dim": 48, "ffn_dim": 80},
    "xglm": {"ffn_dim": 80, "num_layers": 2, "attention_heads": 4},
}


def main(_: list[str]) -> None:
    coverage.drive("language_coverage", lambda _: list(FAMILIES), examine, line, table)


def examine(family: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields what is found of one family, part by part."""
    import dlc_jax as dlc
    from dlc_jax.masking import prunable_paths

    original = stored(family, folder / "5")
    yield {"class": type(original).__name__, "num_params": coverage.num_params(original)}
    as_version_4(folder / "5", folder / "4")
    load = dlc.load_language_model
    models = [load(str(folder / k), dtype="float32", converted=True) for k in "54"]
    tokens, is_token = padded_rows()
    yield {"logits": [logits_distance(model, original, tokens, is_token) for model in models]}
    model = models[0]
    data = responses(tokens)
    paths = prunable_paths(model.params, model.is_prunable, model.module_order)
    probes = dlc.probe_responses(model, data, num_probes=2)
    found = []
    for sparsity, losses in zip(probes.sparsity, probes.losses, strict=True):
        number = round(sum(model.params[path].size for path in paths) * float(sparsity))
        masked = coverage.pruned(original, paths, number)
        found.append(coverage.distance(losses, torch_losses(masked, data)))
    yield {"num_prunable": len(paths), "losses": found}
    tuned, theirs = with_adapters(model, original, folder)
    ours, expected = our_gradient(tuned, data), torch_gradient(theirs, data)
    yield {"gradient": [worst(ours, expected)]}
    with contextlib.suppress(RuntimeError):  # some compute in float32 alone
        exact = torch_gradient(copy.deepcopy(theirs).double(), data)
        yield {"gradient_of_torch": worst(expected, exact)}
    dlc.write_merged(tuned, folder / "merged")
    import transformers

    kind = transformers.AutoModelForCausalLM
    merged = kind.from_pretrained(folder / "merged", attn_implementation="eager").eval()
    ours, expected = (torch_logits(some, tokens, is_token) for some in (merged, theirs))
    yield {"merged": [coverage.distance(ours[is_token], expected[is_token])]}


def stored(family: str, folder: Path) -> Any:
    """Stores a small network of transformers with random weights, and returns it, as it is read."""
    import torch

    peers.import_timm()  # for torchvision
    import transformers

    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    known = {**kind().to_dict(), **kind.attribute_map}
    settings = {key: value for key, value in SIZES.items() if key in known}
    config = kind(**{**settings, **FAMILIES[family]})
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim > 1 else 0.5
            parameter.add_(scale * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    module.save_pretrained(folder)
    again = transformers.AutoModelForCausalLM
    return again.from_pretrained(folder, attn_implementation="eager").eval()


def as_version_4(folder: Path, other: Path) -> None:
    """Copies a model, with the configuration as version 4 of transformers wrote it."""
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        del config["rope_parameters"]
        config["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        config["rope_scaling"] = None
    (other / "config.json").write_text(json.dumps(config))


def padded_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, and which of them are any: whole rows, padded left, padded right."""
    tokens = np.random.default_rng(1).integers(3, SIZES["vocab_size"], (4, 20), np.int32)
    is_token = np.ones(tokens.shape, bool)
    is_token[1, :7] = is_token[2, 13:] = is_token[3, :11] = False
    return np.where(is_token, tokens, 0), is_token


def responses(tokens: np.ndarray) -> Any:
    """Returns the first two rows' tokens as instructions."""
    from dlc_jax.preprocess.tokens import Tokenised

    rows = (tokens[0], tokens[2, :13])
    num_prompt = np.array([5, 3], np.int32)
    return Tokenised(rows, num_prompt, np.zeros(2, bool), np.array(["0", "1"]))


def logits_distance(model: Any, original: Any, tokens: np.ndarray, is_token: np.ndarray) -> float:
    """Returns how far our logits of tokens are off torch's."""
    import jax

    @jax.jit
    def ours(*inputs: Any) -> Any:
        hidden = model.architecture.hidden(*inputs)
        return model.architecture.logits(inputs[0], hidden)

    found = ours(model.params, tokens, is_token.astype(np.int32))
    expected = torch_logits(original, tokens, is_token)
    return coverage.distance(np.asarray(found)[is_token], expected[is_token])


def torch_logits(module: Any, tokens: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """Returns torch's, with places counted from the first token as its `generate` does."""
    import inspect

    import torch

    places = np.where(is_token, np.cumsum(is_token, axis=1) - 1, 0)
    given = {"input_ids": tokens, "attention_mask": is_token, "position_ids": places}
    inner = module.get_base_model() if hasattr(module, "peft_config") else module
    takes = inspect.signature(inner.forward).parameters
    arrays = {key: torch.asarray(value.astype(int)) for key, value in given.items()}
    if not {"position_ids", "kwargs"} & takes.keys():
        del arrays["position_ids"]
    with torch.no_grad():
        return module(**arrays, use_cache=False).logits.float().numpy()


def torch_losses(module: Any, data: Any) -> np.ndarray:
    """Returns the mean cross-entropy of every response in torch."""
    import torch

    with torch.no_grad():
        losses = [response_loss(module, *sample) for sample in samples(data)]
    return np.array([float(loss.mean()) for loss in losses])


def samples(data: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Yields tokens and number of prompt tokens."""
    return zip(data.tokens, data.num_prompt.tolist(), strict=True)


def response_loss(module: Any, tokens: np.ndarray, num_prompt: int) -> Any:
    """Returns the cross-entropies of a response's tokens in torch."""
    import torch

    ids = torch.asarray(tokens.astype(int))[None]
    logits = module(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[num_prompt - 1 :]


def with_adapters(model: Any, original: Any, folder: Path) -> tuple[Any, Any]:
    """Returns our model and torch's with the same random adapter on all layers of the blocks.

    Torch's is read by PEFT from the folder that `write_adapter` writes.
    """
    import jax
    import peft

    import dlc_jax as dlc
    from dlc_jax.encoders.causal_model import TARGETS, Adapter

    adapter = Adapter(4, 8.0, TARGETS)
    shapes = model.architecture.with_adapter(adapter).abstract_adapter()
    numbers = np.random.default_rng(2)
    weights = {
        path: jax.numpy.asarray(0.1 * numbers.normal(size=shape.shape), "float32")
        for path, shape in shapes.items()
    }
    tuned = model.with_adapter(adapter, weights)
    dlc.write_adapter(tuned, folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(original), folder / "adapter", is_trainable=True
    )
    return tuned, theirs.eval()


def our_gradient(tuned: Any, data: Any) -> dict[str, np.ndarray]:
    """Returns our gradient of the summed loss, by PEFT's name of a matrix."""
    from dlc_jax.training.lora.step import Sums, add_rows, rows_of_step

    adapter = {path: tuned.params[path] for path in tuned.architecture.abstract_adapter()}
    (rows,) = rows_of_step(data, np.arange(len(data)), 2, 32, packing=True)
    sums = add_rows(tuned.architecture, tuned.params, adapter, rows, Sums.zero(adapter))
    as_peft = {"lora_a": "lora_A", "lora_b": "lora_B"}
    parts = {path: path.rpartition("/") for path in sums.gradients}
    return {
        f"{layer}.{as_peft[matrix]}": np.asarray(sums.gradients[path]).T
        for path, (layer, _, matrix) in parts.items()
    }


def torch_gradient(theirs: Any, data: Any) -> dict[str, np.ndarray]:
    """Returns PEFT's gradient of the summed loss, by name of a matrix."""
    theirs.zero_grad()
    sum(response_loss(theirs, *sample).sum() for sample in samples(data)).backward()
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value.grad.numpy()
        for name, value in theirs.named_parameters()
        if value.grad is not None
    }


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Returns the largest distance of a matrix, relative to its norm."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(coverage.distance(found[name], expected[name]) for name in expected)


def verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """Returns which parts are those of torch.

    A gradient is also if torch's own in float32 is as far off torch's in float64.
    """
    found = {part: max(row.get(part, [float("inf")])) <= TOLERANCE for part in PARTS}
    own = row.get("gradient_of_torch", 0.0)
    return found | {"gradient": found["gradient"] or row.get("gradient", [1.0])[0] <= 2 * own}


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""

    def cell(part: str) -> str:
        known = f"{max(row[part]):.1e}" if row.get(part) else ""
        return known if verdicts(row)[part] or not known else f"**{known}**"

    cells = [row["name"], row.get("class", ""), *map(cell, PARTS), row["reason"].replace("|", "/")]
    return f"| {' | '.join(cells)} |"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table, and how many families each comparison holds for."""
    titles = ("family", "class", *PARTS, "reason")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *map(line, rows), ""]
    found = [verdicts(row) for row in rows]
    for part in PARTS:
        lines.append(f"- {part}: {sum(row[part] for row in found)} of {len(found)}")
    lines.append(f"- all: {sum(all(row.values()) for row in found)} of {len(found)}")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
