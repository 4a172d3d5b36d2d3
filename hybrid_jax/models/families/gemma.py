"""Gemma 1 to 3 (Gemma Team 2024, 2025): scaled embeddings, norms of 1 + weight, GELU gates, wide heads."""

from __future__ import annotations

import math

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import (
    HEAD_WIDTH,
    INIT_STD,
    KV_HEADS,
    LAYER_TYPES,
    LOCAL_ROPE,
    MAX_LENGTH,
    MLP_WIDTH,
    ROPE,
    SIZES,
    Part,
    activation,
    fixed,
    off,
    same,
)
from hybrid_jax.models.families.weights import Table

_COMMON = (
    *(SIZES, MAX_LENGTH, INIT_STD, MLP_WIDTH, KV_HEADS, HEAD_WIDTH, RMS_NORM),
    fixed(norm="rms", norm_unit_offset=True, mlp="gated", mlp_bias=False),
    same(attention_bias="attention_bias"),
    off("use_bidirectional_attention"),  # an encoder of texts (EmbeddingGemma), which cannot go on with one
    Part(lambda theirs: {"embedding_scale": math.sqrt(theirs.hidden_size)}, lambda config: {}),
)
_SCALE = Part(
    lambda theirs: {"attention_scale": theirs.query_pre_attn_scalar**-0.5},
    lambda config: {"query_pre_attn_scalar": _whole(config.attention_rule(0).score_scale(config.channels))},
)
_SOFTCAP = same(logit_softcap="final_logit_softcapping")
_AROUND: Table = {
    **LLAMA_TABLE,
    "layer_*/attention_output_norm": "layers.*.post_attention_layernorm",
    "layer_*/mlp_norm": "layers.*.pre_feedforward_layernorm",
    "layer_*/mlp_output_norm": "layers.*.post_feedforward_layernorm",
}


def _whole(scale: float) -> int:
    return round(scale**-2)


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    settings=(*_COMMON, ROPE, activation("hidden_act", "gelu_pytorch_tanh")),
    table=LLAMA_TABLE,
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    settings=(
        *(*_COMMON, ROPE, _SCALE, _SOFTCAP, LAYER_TYPES, fixed(norm_placement="around")),
        same(attention_softcap="attn_logit_softcapping"),  # which Gemma 3 has in its file and never reads
        activation("hidden_activation", "gelu_pytorch_tanh"),
    ),
    table=_AROUND,
)

GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    settings=(
        *(*_COMMON, LOCAL_ROPE, _SCALE, _SOFTCAP, LAYER_TYPES),
        fixed(norm_placement="around", query_key_norm="head"),
        activation("hidden_activation", "gelu_pytorch_tanh"),
    ),
    table=_AROUND,
)
