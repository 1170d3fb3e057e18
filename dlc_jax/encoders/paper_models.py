"""Sizes of the paper's three base models, for plans where there is no network.

Facts of their published `config.json` files.

Sources: Jiang et al. 2023, arXiv 2310.06825; Grattafiori et al. 2024, arXiv 2407.21783; Gemma Team
2024, arXiv 2408.00118.
"""

from __future__ import annotations

import dataclasses

from dlc_jax.encoders.decoder import DecoderConfig

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
