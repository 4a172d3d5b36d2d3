"""OLMo 1 and 2 and OLMoE (Groeneveld et al. 2024): norms without parameters, behind branches, on queries."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.qwen import EXPERTS_TABLE
from hybrid_jax.models.families.settings import ROPE, experts, fixed, same

_COMMON = (*LLAMA_SIZES, ROPE, fixed(mlp_bias=False), same(attention_bias="attention_bias"))

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    settings=(
        *(*_COMMON, fixed(norm="layer", norm_scale=False, norm_epsilon=1e-5, mlp="gated")),
        same(clip_qkv="clip_qkv"),
    ),
    table=LLAMA_TABLE,
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    settings=(*_COMMON, RMS_NORM, GATED, fixed(norm_placement="after", query_key_norm="all_heads")),
    table={
        **LLAMA_TABLE,
        "layer_*/attention_output_norm": "layers.*.post_attention_layernorm",
        "layer_*/mlp_output_norm": "layers.*.post_feedforward_layernorm",
    },
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    settings=(
        *(*_COMMON, RMS_NORM, GATED, fixed(query_key_norm="all_heads")),
        same(clip_qkv="clip_qkv"),
        experts("num_experts", "intermediate_size", normalize="norm_topk_prob"),
    ),
    table=EXPERTS_TABLE,
)
