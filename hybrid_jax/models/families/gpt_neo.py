"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled scores and a window in every other layer."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, MAX_LENGTH, SIZES, Part, activation, fixed, same


def _read_layers(theirs):
    windowed = tuple(kind == "local" for kind in theirs.attention_layers)
    return {"window": theirs.window_size, "window_layers": windowed} if any(windowed) else {}


def _write_layers(config):
    kinds = ["local" if config.is_windowed(layer) else "global" for layer in range(config.num_layers)]
    settings = {"attention_types": [[kinds, 1]], "attention_layers": kinds}
    return settings if config.window is None else {**settings, "window_size": config.window}


GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    settings=(
        *(SIZES, MAX_LENGTH, INIT_STD),
        activation("activation_function", "gelu_new"),
        same(norm_epsilon="layer_norm_epsilon", mlp_width="intermediate_size"),
        Part(_read_layers, _write_layers),
        fixed(attention_scale=1.0, attention_bias=False, output_bias=True),
    ),
    table={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "final_norm": "ln_f",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "h.*.ln_1",
        "layer_*/mlp_norm": "h.*.ln_2",
        "layer_*/attention/query": "h.*.attn.attention.q_proj",
        "layer_*/attention/key": "h.*.attn.attention.k_proj",
        "layer_*/attention/value": "h.*.attn.attention.v_proj",
        "layer_*/attention/output": "h.*.attn.attention.out_proj",
        "layer_*/mlp/up": "h.*.mlp.c_fc",
        "layer_*/mlp/down": "h.*.mlp.c_proj",
    },
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.attention\.(bias|masked_bias)",
    embedding="wte.weight",
)
