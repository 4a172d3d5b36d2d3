"""BLOOM (Scao et al. 2022): ALiBi, a norm behind the embedding, fused query-key-value by heads."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, SIZES, Part, fixed, require, same
from hybrid_jax.models.families.weights import Fused

BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    settings=(
        *(SIZES, INIT_STD),
        same(norm_epsilon="layer_norm_epsilon"),
        # ALiBi has no longest sequence; old files say how long the training's were.
        Part(
            lambda theirs: {"max_length": getattr(theirs, "seq_length", None) or 2048},
            lambda config: {"seq_length": config.max_length},
        ),
        fixed(position="alibi", embedding_norm=True, activation="gelu_tanh"),
        require(apply_residual_connection_post_layernorm=False),
    ),
    table={
        "token_embedding": "word_embeddings",
        "embedding_norm": "word_embeddings_layernorm",
        "final_norm": "ln_f",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "h.*.input_layernorm",
        "layer_*/mlp_norm": "h.*.post_attention_layernorm",
        ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
            "h.*.self_attention.query_key_value", groups=lambda config: config.kv_heads
        ),
        "layer_*/attention/output": "h.*.self_attention.dense",
        "layer_*/mlp/up": "h.*.mlp.dense_h_to_4h",
        "layer_*/mlp/down": "h.*.mlp.dense_4h_to_h",
    },
    prefix="transformer.",
    embedding="word_embeddings.weight",
)
