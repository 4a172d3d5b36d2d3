"""GPT-J (Wang & Komatsuzaki 2021): parallel block with one norm, partial interleaved rotary positions."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, MAX_LENGTH, SIZES, Part, activation, fixed, same

GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    settings=(
        *(SIZES, MAX_LENGTH, INIT_STD),
        activation("activation_function", "gelu_new"),
        same(norm_epsilon="layer_norm_epsilon", mlp_width="n_inner"),
        Part(
            lambda theirs: {"rotary_width": theirs.rotary_dim},
            lambda config: {"rotary_dim": config.rotary_channels},
        ),
        fixed(position="rotary", rotary_interleaved=True, block="parallel_shared"),
        fixed(attention_bias=False, mlp_bias=True, head_bias=True),
    ),
    table={
        "token_embedding": "wte",
        "final_norm": "ln_f",
        "lm_head": "lm_head",
        "score": "score",
        "layer_*/attention_norm": "h.*.ln_1",
        "layer_*/attention/query": "h.*.attn.q_proj",
        "layer_*/attention/key": "h.*.attn.k_proj",
        "layer_*/attention/value": "h.*.attn.v_proj",
        "layer_*/attention/output": "h.*.attn.out_proj",
        "layer_*/mlp/up": "h.*.mlp.fc_in",
        "layer_*/mlp/down": "h.*.mlp.fc_out",
    },
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    embedding="wte.weight",
)
