"""Granite (IBM 2024): Llama with multipliers on embedding, scores, branches and logits."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import ROPE, Part, same

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    settings=(
        *(*LLAMA_SIZES, ROPE, RMS_NORM, GATED),
        same(attention_bias="attention_bias", mlp_bias="mlp_bias"),
        same(embedding_scale="embedding_multiplier", residual_scale="residual_multiplier"),
        Part(
            lambda theirs: {
                "attention_scale": theirs.attention_multiplier,
                "logit_scale": 1.0 / theirs.logits_scaling,
            },
            lambda config: {
                "attention_multiplier": config.attention_rule(0).score_scale(config.channels),
                "logits_scaling": 1.0 / config.logit_scale,
            },
        ),
    ),
    table=LLAMA_TABLE,
)
