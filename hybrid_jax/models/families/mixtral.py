"""Mixtral (Jiang et al. 2024): Mistral whose MLPs are eight experts, two for every token."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import HEAD_WIDTH, ROPE, WINDOW, experts, fixed, require
from hybrid_jax.models.families.weights import Stacked

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, ROPE, RMS_NORM, GATED, WINDOW),
        experts("num_local_experts", "intermediate_size", normalize=True),
        fixed(attention_bias=False, mlp_bias=False),
        require(router_jitter_noise=0.0),
    ),
    table={
        **LLAMA_TABLE,
        "layer_*/mlp/router": "layers.*.block_sparse_moe.gate",
        "layer_*/mlp/expert_gate": Stacked("layers.*.block_sparse_moe.experts.+.w1"),
        "layer_*/mlp/expert_up": Stacked("layers.*.block_sparse_moe.experts.+.w3"),
        "layer_*/mlp/expert_down": Stacked("layers.*.block_sparse_moe.experts.+.w2"),
    },
)
