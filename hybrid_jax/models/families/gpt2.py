"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, plain MLP, biases, fused query-key-value."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, MAX_LENGTH, SIZES, Part, activation, require, same
from hybrid_jax.models.families.weights import Fused, Table

GPT2_TABLE: Table = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "final_norm": "ln_f",
    "lm_head": "lm_head",
    "score": "score",
    "layer_*/attention_norm": "h.*.ln_1",
    "layer_*/mlp_norm": "h.*.ln_2",
    ("layer_*/attention/query", "layer_*/attention/key", "layer_*/attention/value"): Fused("h.*.attn.c_attn"),
    "layer_*/attention/output": "h.*.attn.c_proj",
    "layer_*/mlp/up": "h.*.mlp.c_fc",
    "layer_*/mlp/down": "h.*.mlp.c_proj",
}
GPT2_SETTINGS = (
    *(SIZES, MAX_LENGTH, INIT_STD),
    same(norm_epsilon="layer_norm_epsilon", mlp_width="n_inner"),
    Part(
        lambda theirs: {"dropout": theirs.resid_pdrop},
        lambda config: {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": 0.0},
    ),
    Part(
        lambda theirs: {"attention_scale": None if theirs.scale_attn_weights else 1.0},
        lambda config: {"scale_attn_weights": config.attention_rule(0).scale != 1.0},
    ),
    require(add_cross_attention=False),
)

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    settings=(
        *GPT2_SETTINGS,
        activation("activation_function", "gelu_new"),
        same(attention_scale_by_layer="scale_attn_by_inverse_layer_idx"),
    ),
    table=GPT2_TABLE,
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # causal masks that old files carry along
    transposed=False,  # Conv1D keeps [in, out] as we do
    embedding="wte.weight",
)
