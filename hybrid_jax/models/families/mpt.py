"""MPT (MosaicML 2023): ALiBi, no biases anywhere, exact GELU."""

from __future__ import annotations

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, SIZES, Part, fixed, require, same
from hybrid_jax.models.families.weights import Fused


def _read_attention(theirs):
    attention = theirs.attn_config
    if attention.qk_ln or attention.prefix_lm or not attention.alibi:
        raise UserError("attn_config must have alibi, and neither qk_ln nor prefix_lm: not supported")
    if attention.alibi_bias_max != 8:  # the published code reads it, transformers computes with 8
        raise UserError(f"attn_config.alibi_bias_max must be 8, got {attention.alibi_bias_max}: not supported")
    return {
        "attention_scale": attention.softmax_scale,
        "clip_qkv": attention.clip_qkv,
    }


def _write_attention(config):
    return {"attn_config": {"clip_qkv": config.clip_qkv, "softmax_scale": config.attention_scale}}


MPT = Family(
    "mpt",
    "MptForCausalLM",
    settings=(
        *(SIZES, INIT_STD, Part(_read_attention, _write_attention)),
        same(norm_epsilon="layer_norm_epsilon", max_length="max_seq_len"),
        fixed(position="alibi", activation="gelu", norm_bias=False, attention_bias=False, mlp_bias=False),
        require(no_bias=True, logit_scale=None),
    ),
    table={
        "token_embedding": "wte",
        "final_norm": "norm_f",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "blocks.*.norm_1",
        "layer_*/mlp_norm": "blocks.*.norm_2",
        ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused(
            "blocks.*.attn.Wqkv"
        ),
        "layer_*/attention/output": "blocks.*.attn.out_proj",
        "layer_*/mlp/up": "blocks.*.ffn.up_proj",
        "layer_*/mlp/down": "blocks.*.ffn.down_proj",
    },
    prefix="transformer.",
    embedding="wte.weight",
)
