"""Real models, from their published config.json, have exactly the published number of parameters.

The counts are those that the safetensors headers of the published files add up to (for gpt-oss, whose files
are quantised, the sum of its parts is written out).
"""

import math

import jax
import pytest

from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families import FAMILIES

PUBLISHED = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False,
            "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
        },
    ),
    "Gemma-2-9B": (
        9_241_705_984,
        {
            "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_theta": 1000000.0, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8,
            "output_router_logits": False, "router_aux_loss_coef": 0.02,
        },
    ),
    "gpt-oss-20b": (
        20_914_757_184,
        {
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
            "hidden_act": "silu", "max_position_embeddings": 131072, "initial_context_length": 4096,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True, "rope_theta": 150000,
            "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
            "router_aux_loss_coef": 0.9, "output_router_logits": False,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
}  # fmt: skip


SLOW = ("Qwen3-8B", "Gemma-2-9B")  # dozens of layers each, built like the others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PUBLISHED]
)
def test_a_published_model_builds_abstractly_with_its_published_size(name):
    count, config = PUBLISHED[name]
    family = FAMILIES[config["model_type"]]
    model = Decoder(family.read_config(config))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    # and its table knows every one of these parameters, and its config comes back
    assert family.read_config(family.write_config(model.config)).resolved() == model.config.resolved()


def test_the_size_of_gpt_oss_is_the_sum_of_its_parts():
    width, experts, heads, kv_heads, channels, vocab = 2880, 32, 64, 8, 64, 201088
    attention = width * channels * (heads + 2 * kv_heads) + channels * (heads + 2 * kv_heads)
    attention += heads * channels * width + width + heads  # output with bias, sinks
    router = width * experts + experts
    expert = width * 2 * width + 2 * width + width * width + width
    total = 24 * (attention + router + experts * expert + 2 * width) + width + 2 * vocab * width
    assert total == PUBLISHED["gpt-oss-20b"][0]
