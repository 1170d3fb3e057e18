"""The decoder against the torch classes of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import XLA_IS_OLD
from flax import nnx

from dlc_jax.encoders import decoder
from dlc_jax.encoders.decoder import Architecture, Decoder
from dlc_jax.encoders.language_model import read_config, read_params

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
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 3.0 if parameter.ndim > 1 else 0.5
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
@pytest.mark.parametrize("side", [pytest.param("left", marks=pytest.mark.slow), "right"])
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
