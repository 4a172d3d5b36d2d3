"""SmolLM3 (Hugging Face 2025): Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import LAYER_TYPES, ROPE, Part, same

SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    settings=(
        *(*LLAMA_SIZES, ROPE, RMS_NORM, GATED, LAYER_TYPES),
        same(attention_bias="attention_bias", mlp_bias="mlp_bias"),
        Part(
            lambda theirs: {"rotary_layers": tuple(bool(rotary) for rotary in theirs.no_rope_layers)},
            lambda config: {
                "no_rope_layers": [int(config.is_rotary(layer)) for layer in range(config.num_layers)],
                "use_sliding_window": config.window is not None,
            },
        ),
    ),
    table=LLAMA_TABLE,
)
