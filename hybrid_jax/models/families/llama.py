"""Llama (Touvron et al. 2023), Mistral: rotary positions, RMSNorm, gated MLP, grouped-query attention."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import (
    HEAD_WIDTH,
    INIT_STD,
    KV_HEADS,
    MAX_LENGTH,
    MLP_WIDTH,
    OPTIONAL_HEAD_WIDTH,
    ROPE,
    SIZES,
    WINDOW,
    activation,
    fixed,
    same,
)
from hybrid_jax.models.families.weights import Table

# What most later families have in common with Llama.
LLAMA_SIZES = (
    *(SIZES, MAX_LENGTH, INIT_STD, MLP_WIDTH, KV_HEADS, OPTIONAL_HEAD_WIDTH),
    activation("hidden_act"),
)
RMS_NORM = same(norm_epsilon="rms_norm_eps")
GATED = fixed(norm="rms", mlp="gated")

LLAMA_TABLE: Table = {
    "token_embedding": "embed_tokens",
    "final_norm": "norm",
    "lm_head": "lm_head",
    "score": "score",
    "layer_*/attention_norm": "layers.*.input_layernorm",
    "layer_*/mlp_norm": "layers.*.post_attention_layernorm",
    "layer_*/attention/query": "layers.*.self_attn.q_proj",
    "layer_*/attention/key": "layers.*.self_attn.k_proj",
    "layer_*/attention/value": "layers.*.self_attn.v_proj",
    "layer_*/attention/output": "layers.*.self_attn.o_proj",
    "layer_*/attention/query_norm": "layers.*.self_attn.q_norm",
    "layer_*/attention/key_norm": "layers.*.self_attn.k_norm",
    "layer_*/mlp/gate": "layers.*.mlp.gate_proj",
    "layer_*/mlp/up": "layers.*.mlp.up_proj",
    "layer_*/mlp/down": "layers.*.mlp.down_proj",
}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, ROPE, RMS_NORM, GATED),
        same(attention_bias="attention_bias", mlp_bias="mlp_bias"),
    ),
    table=LLAMA_TABLE,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, ROPE, RMS_NORM, GATED, WINDOW),
        fixed(attention_bias=False, mlp_bias=False),
    ),
    table=LLAMA_TABLE,
)
