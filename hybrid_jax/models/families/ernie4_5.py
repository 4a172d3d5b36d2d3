"""ERNIE 4.5, dense (Baidu 2025): Llama whose rotary pairs are neighbours, with one switch for all biases."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import HEAD_WIDTH, ROPE, fixed, same

ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, ROPE, RMS_NORM, GATED),
        fixed(rotary_interleaved=True),
        same(attention_bias="use_bias", mlp_bias="use_bias"),
    ),
    table=LLAMA_TABLE,
)
