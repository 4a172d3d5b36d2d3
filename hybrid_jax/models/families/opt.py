"""OPT (Zhang et al. 2022): learned positions from row 2 on, ReLU; 350M has its norms after the sum."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import MAX_LENGTH, SIZES, Part, activation, fixed, same


def _read(theirs):
    before, width = theirs.do_layer_norm_before, theirs.word_embed_proj_dim
    return {
        "norm_placement": "before" if before else "residual",
        "final_norm": before and not theirs._remove_final_layer_norm,
        "embedding_width": None if width == theirs.hidden_size else width,
        "attention_bias": theirs.enable_bias,
        "mlp_bias": theirs.enable_bias,
        "dropout": theirs.dropout,
    }


def _write(config):
    before = config.norm_placement == "before"
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "word_embed_proj_dim": config.embedding_width or config.width,
        "ffn_dim": config.inner_width,
        "enable_bias": config.attention_bias,
        "dropout": config.dropout,
    }


OPT = Family(
    "opt",
    "OPTForCausalLM",
    settings=(
        *(SIZES, MAX_LENGTH, Part(_read, _write)),
        activation("activation_function"),
        same(mlp_width="ffn_dim", init_std="init_std", norm_scale="layer_norm_elementwise_affine"),
        fixed(position_offset=2, norm_epsilon=1e-5),
    ),
    table={
        "token_embedding": "decoder.embed_tokens",
        "position_embedding": "decoder.embed_positions",
        "embedding_in": "decoder.project_in",
        "embedding_out": "decoder.project_out",
        "final_norm": "decoder.final_layer_norm",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "decoder.layers.*.self_attn_layer_norm",
        "layer_*/mlp_norm": "decoder.layers.*.final_layer_norm",
        "layer_*/attention/query": "decoder.layers.*.self_attn.q_proj",
        "layer_*/attention/key": "decoder.layers.*.self_attn.k_proj",
        "layer_*/attention/value": "decoder.layers.*.self_attn.v_proj",
        "layer_*/attention/output": "decoder.layers.*.self_attn.out_proj",
        "layer_*/mlp/up": "decoder.layers.*.fc1",
        "layer_*/mlp/down": "decoder.layers.*.fc2",
    },
    embedding="decoder.embed_tokens.weight",
)
