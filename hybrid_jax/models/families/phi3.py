"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with fused maps, LongRoPE and a window."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import PARTIAL_ROPE, WINDOW, Part, fixed
from hybrid_jax.models.families.weights import Fused, with_fused

FUSED_GATE = {("layer_*/mlp/gate", "layer_*/mlp/up"): Fused("layers.*.mlp.gate_up_proj")}


def _write_original_length(config):
    length = getattr(config.rope_scaling, "original_length", config.max_length)
    return {"original_max_position_embeddings": length}


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    settings=(
        *(*LLAMA_SIZES, PARTIAL_ROPE, RMS_NORM, GATED, WINDOW),
        Part(lambda theirs: {}, _write_original_length),
        fixed(attention_bias=False, mlp_bias=False),
        Part(
            lambda theirs: {"dropout": theirs.resid_pdrop},
            lambda config: {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout},
        ),
    ),
    table=with_fused(
        LLAMA_TABLE,
        {
            ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
                "layers.*.self_attn.qkv_proj"
            ),
            **FUSED_GATE,
        },
    ),
)
