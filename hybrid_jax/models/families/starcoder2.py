"""StarCoder2 (Lozhkov et al. 2024): layer norms, plain GELU MLP, biases, grouped queries, rotary, a window."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import LLAMA_SIZES, LLAMA_TABLE
from hybrid_jax.models.families.settings import ROPE, WINDOW, Part, same

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    settings=(
        *(*LLAMA_SIZES, ROPE, WINDOW),
        same(norm_epsilon="norm_epsilon", dropout="residual_dropout"),
        Part(
            lambda theirs: {"attention_bias": theirs.use_bias, "mlp_bias": theirs.use_bias},
            lambda config: {"use_bias": config.attention_bias, "embedding_dropout": config.dropout},
        ),
    ),
    table={
        **LLAMA_TABLE,
        "layer_*/mlp/up": "layers.*.mlp.c_fc",
        "layer_*/mlp/down": "layers.*.mlp.c_proj",
    },
)
