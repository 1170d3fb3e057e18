"""Sizes of the paper's three base models and of two later ones, for plans without a network.

They are facts of their published `config.json` files.
"""

import dataclasses

from dlc_jax.encoders.decoder import DecoderConfig
from dlc_jax.encoders.rotations import LinearScaling

_MISTRAL_7B = DecoderConfig(
    vocab_size=32768,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    windows=(None,) * 32,
    max_length=32768,
    norm_epsilon=1e-5,
    rope_theta=1e6,
    rope_scaling=None,
    attention_scale=128**-0.5,
)
PAPER_MODELS = {  # hub id -> sizes and switches
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
    "meta-llama/Meta-Llama-3-8B": dataclasses.replace(
        _MISTRAL_7B, vocab_size=128256, max_length=8192, rope_theta=5e5
    ),
    "google/gemma-2-9b": DecoderConfig(
        vocab_size=256000,
        width=3584,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        mlp_width=14336,
        windows=(4096, None) * 21,
        max_length=8192,
        norm_epsilon=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        attention_scale=256**-0.5,
        attention_cap=50.0,
        final_cap=30.0,
        activation="gelu_pytorch_tanh",
        sandwich=True,
        offset_norm=True,
        scale_embedding=True,
        tied=True,
    ),
}
KNOWN_MODELS = PAPER_MODELS | {
    "Qwen/Qwen3-8B": dataclasses.replace(
        _MISTRAL_7B,
        vocab_size=151936,
        mlp_width=12288,
        windows=(None,) * 36,
        max_length=40960,
        norm_epsilon=1e-6,
        norms_heads=True,
    ),
    # its decoder, beside which the published model has a tower for images
    "google/gemma-3-12b-pt": dataclasses.replace(
        PAPER_MODELS["google/gemma-2-9b"],
        vocab_size=262208,
        width=3840,
        mlp_width=15360,
        windows=((1024,) * 5 + (None,)) * 8,
        max_length=131072,
        rope_theta=1e6,
        rope_scaling=LinearScaling(8.0),
        attention_cap=None,
        final_cap=None,
        norms_heads=True,
        window_rope_theta=1e4,
    ),
}
