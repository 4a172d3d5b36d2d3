"""GLM-4 (GLM Team 2024): norms before and behind each branch, partial interleaved rotary, fused gate."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.phi3 import FUSED_GATE
from hybrid_jax.models.families.settings import HEAD_WIDTH, PARTIAL_ROPE, fixed, same
from hybrid_jax.models.families.weights import with_fused

GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, PARTIAL_ROPE, RMS_NORM, GATED),
        same(attention_bias="attention_bias"),
        fixed(norm_placement="around", rotary_interleaved=True, output_bias=False, mlp_bias=False),
    ),
    table={
        **with_fused(LLAMA_TABLE, FUSED_GATE),
        "layer_*/attention_output_norm": "layers.*.post_self_attn_layernorm",
        "layer_*/mlp_output_norm": "layers.*.post_mlp_layernorm",
    },
)
