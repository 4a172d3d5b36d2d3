"""StableLM (Bellagente et al. 2024): Llama with layer norms, partial rotary, optionally a parallel block."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import LLAMA_SIZES, LLAMA_TABLE
from hybrid_jax.models.families.settings import EVEN_ROPE, Part, fixed, same
from hybrid_jax.models.families.weights import Stacked

STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    settings=(
        *(*LLAMA_SIZES, EVEN_ROPE),
        same(norm_epsilon="layer_norm_eps", attention_bias="use_qkv_bias"),
        fixed(norm="layer", mlp="gated", output_bias=False, mlp_bias=False),
        Part(
            lambda theirs: {
                "block": "parallel_shared" if theirs.use_parallel_residual else "sequential",
                "query_key_norm": "each_head" if theirs.qk_layernorm else None,
            },
            lambda config: {
                "use_parallel_residual": config.block == "parallel_shared",
                "qk_layernorm": config.query_key_norm == "each_head",
            },
        ),
    ),
    table={
        **LLAMA_TABLE,
        "layer_*/attention/query_norm": Stacked("layers.*.self_attn.q_layernorm.norms.+"),
        "layer_*/attention/key_norm": Stacked("layers.*.self_attn.k_layernorm.norms.+"),
    },
)
