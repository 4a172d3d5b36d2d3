"""GPT-NeoX (Black et al. 2022) and Pythia: parallel block with two norms, partial rotary positions."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import (
    INIT_STD,
    MAX_LENGTH,
    MLP_WIDTH,
    PARTIAL_ROPE,
    SIZES,
    Part,
    activation,
    same,
)
from hybrid_jax.models.families.weights import Fused

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    settings=(
        *(SIZES, MAX_LENGTH, INIT_STD, MLP_WIDTH, PARTIAL_ROPE),
        activation("hidden_act", "gelu"),
        same(norm_epsilon="layer_norm_eps", attention_bias="attention_bias"),
        Part(
            lambda theirs: {"block": "parallel" if theirs.use_parallel_residual else "sequential"},
            lambda config: {"use_parallel_residual": config.block == "parallel"},
        ),
    ),
    table={
        "token_embedding": "embed_in",
        "final_norm": "final_layer_norm",
        "lm_head": "embed_out",
        "score": "score",
        "layer_*/attention_norm": "layers.*.input_layernorm",
        "layer_*/mlp_norm": "layers.*.post_attention_layernorm",
        ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
            "layers.*.attention.query_key_value", groups=lambda config: config.kv_heads
        ),
        "layer_*/attention/output": "layers.*.attention.dense",
        "layer_*/mlp/up": "layers.*.mlp.dense_h_to_4h",
        "layer_*/mlp/down": "layers.*.mlp.dense_4h_to_h",
    },
    prefix="gpt_neox.",
    heads=("embed_out", "score"),
    ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    embedding="embed_in.weight",
    head="embed_out.weight",
)
