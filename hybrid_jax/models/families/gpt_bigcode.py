"""GPT-BigCode (SantaCoder, StarCoder; Allal et al. 2023): GPT-2 with one key/value head for all queries."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.gpt2 import GPT2_SETTINGS, GPT2_TABLE
from hybrid_jax.models.families.settings import Part, activation
from hybrid_jax.models.families.weights import Fused

GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    settings=(
        *GPT2_SETTINGS,
        activation("activation_function", "gelu_pytorch_tanh"),
        Part(
            lambda theirs: {"num_kv_heads": 1 if theirs.multi_query else theirs.num_attention_heads},
            lambda config: {"multi_query": config.kv_heads == 1},
        ),
    ),
    table={
        **GPT2_TABLE,
        ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
            "h.*.attn.c_attn", groups=lambda config: config.kv_heads
        ),
    },
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    embedding="wte.weight",
)
