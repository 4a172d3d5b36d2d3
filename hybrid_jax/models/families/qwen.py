"""Qwen2, Qwen3 (Yang et al. 2024, 2025) and their mixtures of experts: Llama with other biases and norms."""

from __future__ import annotations

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.llama import GATED, LLAMA_SIZES, LLAMA_TABLE, RMS_NORM
from hybrid_jax.models.families.settings import (
    HEAD_WIDTH,
    LAYER_TYPES,
    ROPE,
    WINDOW,
    Part,
    experts,
    fixed,
    same,
    sparse_layers,
)
from hybrid_jax.models.families.weights import Stacked, Table

_COMMON = (*LLAMA_SIZES, ROPE, RMS_NORM, GATED)
_USES_WINDOW = Part(lambda theirs: {}, lambda config: {"use_sliding_window": config.window is not None})
_QKV_BIAS = fixed(attention_bias=True, output_bias=False, mlp_bias=False)

# A router and one triple of maps an expert, beside the dense MLP of layers that have no experts.
EXPERTS_TABLE: Table = {
    **LLAMA_TABLE,
    "layer_*/mlp/router": "layers.*.mlp.gate",
    "layer_*/mlp/expert_gate": Stacked("layers.*.mlp.experts.+.gate_proj"),
    "layer_*/mlp/expert_up": Stacked("layers.*.mlp.experts.+.up_proj"),
    "layer_*/mlp/expert_down": Stacked("layers.*.mlp.experts.+.down_proj"),
    "layer_*/mlp/shared_gate": "layers.*.mlp.shared_expert_gate",
    "layer_*/mlp/shared/gate": "layers.*.mlp.shared_expert.gate_proj",
    "layer_*/mlp/shared/up": "layers.*.mlp.shared_expert.up_proj",
    "layer_*/mlp/shared/down": "layers.*.mlp.shared_expert.down_proj",
}

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    settings=(*_COMMON, LAYER_TYPES, _USES_WINDOW, _QKV_BIAS),
    table=LLAMA_TABLE,
)

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    settings=(
        *(*_COMMON, LAYER_TYPES, _USES_WINDOW, fixed(output_bias=False, mlp_bias=False)),
        same(attention_bias="qkv_bias"),
        sparse_layers(
            experts(
                "num_experts",
                "moe_intermediate_size",
                normalize="norm_topk_prob",
                shared="shared_expert_intermediate_size",
                shared_gate=True,
            )
        ),
    ),
    table=EXPERTS_TABLE,
)

_QWEN3 = (*_COMMON, HEAD_WIDTH, fixed(query_key_norm="head", mlp_bias=False))

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    settings=(*_QWEN3, LAYER_TYPES, _USES_WINDOW, same(attention_bias="attention_bias")),
    table=LLAMA_TABLE,
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    settings=(
        *(*_QWEN3, WINDOW, _USES_WINDOW),
        same(attention_bias="attention_bias"),
        sparse_layers(experts("num_experts", "moe_intermediate_size", normalize="norm_topk_prob")),
    ),
    table=EXPERTS_TABLE,
)
