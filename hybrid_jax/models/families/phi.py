"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): parallel block with one norm, partial rotary, biases everywhere."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import LLAMA_SIZES, LLAMA_TABLE
from hybrid_jax.models.families.settings import EVEN_ROPE, Part, fixed, same

PHI = Family(
    "phi",
    "PhiForCausalLM",
    settings=(
        *(*LLAMA_SIZES, EVEN_ROPE),
        same(norm_epsilon="layer_norm_eps"),
        fixed(block="parallel_shared", head_bias=True),
        Part(
            lambda theirs: {"dropout": theirs.resid_pdrop},
            lambda config: {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout},
        ),
        Part(
            lambda theirs: {
                "query_key_norm": "head" if theirs.qk_layernorm else None,
                "query_key_norm_bias": theirs.qk_layernorm,
            },
            lambda config: {"qk_layernorm": config.query_key_norm is not None},
        ),
    ),
    table={
        **LLAMA_TABLE,
        "final_norm": "final_layernorm",
        "layer_*/attention/output": "layers.*.self_attn.dense",
        "layer_*/attention/query_norm": "layers.*.self_attn.q_layernorm",
        "layer_*/attention/key_norm": "layers.*.self_attn.k_layernorm",
        "layer_*/mlp/up": "layers.*.mlp.fc1",
        "layer_*/mlp/down": "layers.*.mlp.fc2",
    },
)
