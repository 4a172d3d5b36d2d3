"""gpt-oss (OpenAI 2025): attention sinks, windows in every other layer, YaRN, clamped experts with biases."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import HEAD_WIDTH, LAYER_TYPES, ROPE, experts, fixed, require, same
from hybrid_jax.models.families.weights import Tensor

_EXPERTS = "layers.*.mlp.experts"


def _in_pairs(config) -> int:
    """Gate and up alternate, column by column."""
    return config.experts.width


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    settings=(
        *(*LLAMA_SIZES, HEAD_WIDTH, ROPE, RMS_NORM, GATED, LAYER_TYPES),
        experts(
            "num_local_experts",
            "intermediate_size",
            normalize=True,
            router_bias=True,
            bias=True,
            clamped=True,
        ),
        same(attention_bias="attention_bias"),
        fixed(attention_sinks=True, mlp_bias=False),
        require(swiglu_alpha=1.702, swiglu_limit=7.0),
    ),
    table={
        **LLAMA_TABLE,
        "layer_*/attention/sinks": Tensor("layers.*.self_attn.sinks"),
        "layer_*/mlp/router": "layers.*.mlp.router",
        ("layer_*/mlp/expert_gate/kernel", "layer_*/mlp/expert_up/kernel"): Tensor(
            f"{_EXPERTS}.gate_up_proj", groups=_in_pairs
        ),
        ("layer_*/mlp/expert_gate/bias", "layer_*/mlp/expert_up/bias"): Tensor(
            f"{_EXPERTS}.gate_up_proj_bias", groups=_in_pairs
        ),
        "layer_*/mlp/expert_down/kernel": Tensor(f"{_EXPERTS}.down_proj"),
        "layer_*/mlp/expert_down/bias": Tensor(f"{_EXPERTS}.down_proj_bias"),
    },
)
