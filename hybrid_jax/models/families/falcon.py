"""Falcon (Almazrouei et al. 2023): multi-query or grouped-query, parallel block, rotary positions or ALiBi."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, MAX_LENGTH, ROPE, SIZES, Part, activation, same
from hybrid_jax.models.families.weights import Fused


def _read(theirs):
    grouped, norms = theirs.new_decoder_architecture, theirs.num_ln_in_parallel_attn
    parallel = "parallel" if grouped and norms in (None, 2) else "parallel_shared"
    return {
        "num_kv_heads": theirs.num_kv_heads if grouped or not theirs.multi_query else 1,
        "block": parallel if grouped or theirs.parallel_attn else "sequential",
        "attention_bias": theirs.bias,
        "mlp_bias": theirs.bias,
        **({"position": "alibi", "alibi_scaled": True} if theirs.alibi else ROPE.read(theirs)),
    }


def _write(config):
    grouped = config.block == "parallel" or config.kv_heads not in (1, config.num_heads)
    rotary = config.position == "rotary"
    return {
        "new_decoder_architecture": grouped,
        "multi_query": not grouped and config.kv_heads == 1,
        "num_kv_heads": config.kv_heads,
        "num_ln_in_parallel_attn": 2 if config.block == "parallel" else 1 if grouped else None,
        "parallel_attn": config.block != "sequential",
        "bias": config.attention_bias,
        "alibi": not rotary,
        **(ROPE.write(config) if rotary else {}),
    }


def _table(config):
    two_norms = config.block == "parallel"
    return {
        "token_embedding": "word_embeddings",
        "final_norm": "ln_f",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "h.*.ln_attn" if two_norms else "h.*.input_layernorm",
        "layer_*/mlp_norm": "h.*.ln_mlp" if two_norms else "h.*.post_attention_layernorm",
        ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
            "h.*.self_attention.query_key_value", groups=lambda config: config.kv_heads
        ),
        "layer_*/attention/output": "h.*.self_attention.dense",
        "layer_*/mlp/up": "h.*.mlp.dense_h_to_4h",
        "layer_*/mlp/down": "h.*.mlp.dense_4h_to_h",
    }


FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    settings=(
        *(SIZES, MAX_LENGTH, INIT_STD, Part(_read, _write)),
        activation("activation", "gelu"),
        same(norm_epsilon="layer_norm_epsilon", mlp_width="ffn_hidden_size"),
    ),
    table=_table,
    prefix="transformer.",
    embedding="word_embeddings.weight",
)
