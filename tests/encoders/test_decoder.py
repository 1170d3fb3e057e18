"""The decoder against the torch classes of transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import XLA_IS_OLD, slow_but
from flax import nnx

from dlc_jax.encoders import decoder, known_models, rotations
from dlc_jax.encoders.decoder import Architecture, Decoder
from dlc_jax.encoders.language_model import (
    load_language_model,
    read_config,
    read_config_alone,
    read_params,
)
from dlc_jax.types import by_path, path_name

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 17,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
}
MIXED = ["sliding_attention", "full_attention"] * 2
MODELS |= {
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "rope_parameters": YARN | {"attention_factor": 0.9, "truncate": False},
        },
    ),
    "qwen3": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 17,
            "layer_types": MIXED,
            "rope_parameters": GEMMA3_ROPE,
            "attention_bias": True,
        },
    ),
}
LENGTH = 40


@pytest.fixture(scope="module")
def torch_models(timm, tmp_path_factory):
    """Random models on disk, with weights large enough for every switch to matter."""
    import torch
    import transformers

    def make(name):
        family, options = MODELS[name]
        config = getattr(transformers, f"{family}Config")(**SIZES, **options)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
        # yarn sharpens attention, which magnifies what is rounded
        of_matrices = 2.0 if name in ("llama-biases", "qwen2") else 3.0
        with torch.no_grad():
            for parameter in model.parameters():
                scale = of_matrices if parameter.ndim > 1 else 0.5
                parameter.add_(scale * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder, model

    return {name: make(name) for name in MODELS}


def logits_of(config, params, tokens, is_token, **options):
    network = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(network, params)
    hidden = network.hidden(jnp.asarray(tokens), jnp.asarray(is_token, int), **options)
    return np.asarray(network.logits(hidden))


def padded(side):
    tokens = np.random.default_rng(1).integers(1, SIZES["vocab_size"], (3, LENGTH))
    is_token = np.ones(tokens.shape, bool)
    for row, num in enumerate((0, 5, 23)):
        is_token[row, slice(num) if side == "left" else slice(LENGTH - num, None)] = False
    return np.where(is_token, tokens, 0), is_token


def torch_logits(model, tokens, is_token):
    import torch

    with torch.no_grad():
        found = model(
            input_ids=torch.asarray(tokens), attention_mask=torch.asarray(is_token.astype(int))
        )
    return found.logits.numpy()


def error(ours, theirs, is_token):
    difference = np.abs(ours - theirs)[is_token]
    return difference.max() / np.abs(theirs[is_token]).max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", slow_but(["right"], ["left", "right"]))
def test_logits_are_those_of_torch(torch_models, name, side):
    folder, model = torch_models[name]
    config = read_config(folder)
    params = read_params(folder, Architecture(config, "float32"))
    tokens, is_token = padded(side)
    ours = logits_of(config, params, tokens, is_token)
    assert error(ours, torch_logits(model, tokens, is_token), is_token) <= 1e-5
    again = logits_of(config, params, tokens, is_token, rematerialise=True)
    atol = 2e-4 if XLA_IS_OLD else 1e-5  # that of 0.8 fuses other operations: 1.2e-4
    np.testing.assert_allclose(again, ours, rtol=1e-5, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_attention_in_parts_is_the_same(torch_models, name, monkeypatch):
    """Queries go in parts, each with only the keys that it can see; several share a row."""
    folder, model = torch_models[name]
    config = read_config(folder)
    params = read_params(folder, Architecture(config, "float32"))
    tokens, is_token = padded("right")
    monkeypatch.setattr(decoder, "_QUERIES_AT_ONCE", 6)
    ours = logits_of(config, params, tokens, is_token)
    assert error(ours, torch_logits(model, tokens, is_token), is_token) <= 1e-5
    one, other = tokens[:1, :15], tokens[:1, 15:]
    shared = logits_of(config, params, tokens[:1], np.array([[1] * 15 + [2] * (LENGTH - 15)]))
    for part, found in ((one, shared[:, :15]), (other, shared[:, 15:])):
        is_token = np.ones(part.shape, bool)
        assert error(found, torch_logits(model, part, is_token), is_token) <= 5e-5


SWITCHES = {
    "llama3": {"rope_theta": 1e4, "attention_scale": 0.3, "activation": "gelu_pytorch_tanh"},
    "llama3.1": {"rope_scaling": None, "norm_epsilon": 0.1},
    "mistral": {"windows": (7,) * 4},
    "mistral-window": {"windows": (8,) * 4},
    "gemma2": {
        "windows": (None, 7, None, 7),
        "attention_scale": 10**-0.5,
        "attention_cap": None,
        "final_cap": None,
        "activation": "silu",
        "offset_norm": False,
        "scale_embedding": False,
    },
    "llama-biases": {
        "rope_scaling": rotations.YarnScaling(4.0, 32.0, 1.0, 64, 0.1 * np.log(4) + 1),
    },
    "qwen2": {
        "windows": (7,) * 4,
        "rope_scaling": rotations.YarnScaling(4.0, 4.0, 1.0, 64, 0.9, True),
    },
    "qwen3": {"rope_scaling": rotations.LinearScaling(2.0)},
    "gemma3": {
        "windows": (7, 7, None, None),
        "window_rope_theta": None,
        "rope_scaling": None,
        "attention_scale": 10**-0.5,
    },
}


@pytest.mark.parametrize(
    ("name", "switch"), [(name, switch) for name in SWITCHES for switch in SWITCHES[name]]
)
def test_every_switch_matters(torch_models, name, switch):
    folder, model = torch_models[name]
    config = read_config(folder)
    params = read_params(folder, Architecture(config, "float32"))
    flipped = dataclasses.replace(config, **{switch: SWITCHES[name][switch]})
    tokens, is_token = padded("right")
    ours = logits_of(flipped, params, tokens, is_token)
    assert error(ours, torch_logits(model, tokens, is_token), is_token) > 1e-3


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama-biases", "o_proj/bias"),
        ("llama-biases", "down_proj/bias"),
        ("qwen2", "k_proj/bias"),
        ("qwen3", "q_norm/scale"),
        ("gemma3", "k_norm/scale"),
    ],
)
def test_every_part_matters(torch_models, name, part):
    """Moved, the logits move: those of a model that left it out would be others."""
    folder, model = torch_models[name]
    config = read_config(folder)
    params = read_params(folder, Architecture(config, "float32"))
    tokens, is_token = padded("right")
    leaves = by_path(params)
    paths = [path for path in leaves if path.endswith(part)]
    assert len(paths) == config.depth
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[::-1] if path_name(path) in paths else leaf, params
    )
    ours = logits_of(config, moved, tokens, is_token)
    assert error(ours, torch_logits(model, tokens, is_token), is_token) > 1e-3


OLD_AND_NEW = {
    "qwen2": (
        {
            "model_type": "qwen2",
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "use_sliding_window": False,
            "sliding_window": 32,
            "max_window_layers": 2,
        },
        {
            "model_type": "qwen2",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "layer_types": ["full_attention"] * 4,
        },
    ),
    "gemma3_text": (
        {
            "model_type": "gemma3_text",
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
            "sliding_window": 7,
        },
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            "layer_types": MIXED,
            "sliding_window": 7,
        },
    ),
}


@pytest.mark.parametrize("family", OLD_AND_NEW)
def test_configurations_of_versions_4_and_5_of_transformers(tmp_path, family):
    found = []
    for style in OLD_AND_NEW[family]:
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, "hidden_size": 60, **style}))
        found.append(read_config_alone(tmp_path))
    assert found[0] == found[1]
    if family == "qwen2":
        amplitude = 0.1 * np.log(4) + 1
        assert found[0].rope_scaling == rotations.YarnScaling(4.0, 32.0, 1.0, 16, amplitude)
        assert found[0].windows == (None,) * 4
        assert found[0].biases == ("q_proj", "k_proj", "v_proj")
    else:
        assert found[0].windows == (7, None, 7, None)
        assert (found[0].rope_theta, found[0].window_rope_theta) == (1e6, 1e4)
        assert found[0].rope_scaling == rotations.LinearScaling(8.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 4, "sliding_window": 4},
            "model_type, as transformers reads it: unknown value 'ministral'",
        ),
        ({"model_type": "llama", "is_causal": False}, "is_causal is off"),
        (
            {"model_type": "qwen2", "layer_types": MIXED},
            "layer_types has sliding_attention, sliding_window is None; expected a number",
        ),
        (
            {"model_type": "llama", "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor of rope_parameters: must be > 1",
        ),
        (
            {"model_type": "llama", "rope_parameters": YARN | {"beta_fast": -1.0}},
            "beta_fast of rope_parameters: must be > 0, got -1",
        ),
        (
            {"model_type": "llama", "rope_parameters": YARN | {"rope_theta": 1}},
            "rope_theta of rope_parameters 1 with yarn; expected another",
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None},
            },
            "factor of rope_parameters: expected a number, got None",
        ),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(tmp_path, changes, says):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **changes}))
    with pytest.raises(ValueError, match=rf"config\.json: {says}"):
        read_config_alone(tmp_path)


def test_settings_that_transformers_reads_otherwise(tmp_path):
    """Of two lengths before scaling that beside the rotary settings counts; a cap does nothing."""

    def read(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **changes}))
        return read_config_alone(tmp_path)

    found = read(model_type="llama", rope_parameters=YARN, original_max_position_embeddings=16)
    assert found.rope_scaling.original_length == 16
    sizes = {"hidden_size": 60, "attn_logit_softcapping": 2.0}
    assert read(model_type="gemma3_text", **sizes).attention_cap is None
    assert read(model_type="gemma2", **sizes).attention_cap == 2.0


def test_biases_are_added_before_rounding():
    """As torch does in half precision."""
    import torch

    generator = np.random.default_rng(0)
    x, kernel, bias = (
        generator.normal(size=shape).astype(np.float32) for shape in ((64, 128), (128, 96), (96,))
    )
    how = {"adapter": None, "biased": ("q_proj",), "dtype": "bfloat16", "rngs": nnx.Rngs(0)}
    projection = decoder.Projection("q_proj", 128, 96, **how)
    projection.kernel[...] = jnp.asarray(kernel, "bfloat16")
    projection.bias[...] = jnp.asarray(bias, "bfloat16")
    ours = np.asarray(projection(jnp.asarray(x, "bfloat16")), np.float32)
    given = [torch.asarray(value).bfloat16() for value in (x, kernel.T.copy(), bias)]
    theirs = torch.nn.functional.linear(*given).float().numpy()
    assert np.mean(ours != theirs) < 0.01  # rounded twice: an eighth


def test_fingerprints_of_version_0_1_stay():
    config = known_models.PAPER_MODELS["mistralai/Mistral-7B-v0.3"]
    assert "biases" not in repr(config)
    assert "biases=('q_proj',)" in repr(dataclasses.replace(config, biases=("q_proj",)))
    architecture = Architecture(config, "float32")
    assert "loops" not in repr(architecture)
    assert repr(dataclasses.replace(architecture, loops=False)) == repr(architecture)


def test_fingerprint_of_the_bundled_model_stays():
    """What was scored and trained with it before counts as the same."""
    model = load_language_model("demo:tiny-llama", dtype="float32")
    assert model.fingerprint.startswith("ed4ba426a6efb2ca")


# Facts of published config.json files
PUBLISHED = {
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "google/gemma-3-12b-pt": {
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_for_plans_are_those_of_published_configurations(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert read_config_alone(tmp_path) == known_models.KNOWN_MODELS[name]
