"""Command-R (Cohere 2024): parallel block with one biasless layer norm, interleaved rotary, scaled logits."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import LLAMA_SIZES, LLAMA_TABLE
from hybrid_jax.models.families.settings import ROPE, Part, fixed, same

COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    settings=(
        *(*LLAMA_SIZES, ROPE),
        same(norm_epsilon="layer_norm_eps", logit_scale="logit_scale", attention_bias="attention_bias"),
        fixed(norm_bias=False, mlp="gated", mlp_bias=False, block="parallel_shared", rotary_interleaved=True),
        Part(
            lambda theirs: {"query_key_norm": "each_head" if theirs.use_qk_norm else None},
            lambda config: {"use_qk_norm": config.query_key_norm == "each_head"},
        ),
    ),
    table=LLAMA_TABLE,
)
