"""Tiny random models of `transformers`, saved to folders: every family, and every switch at least once."""

import pytest

_SIZES = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {**_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
_PAIR = ["sliding_attention", "full_attention"]
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}


def _rope(kind="default", theta=500.0, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


# name: settings; the first word is the model_type
CASES = {
    "gpt2": _GPT2,
    "gpt2 untied, exact gelu": {**_GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
    "gpt2 scores divided by layer": {
        **_GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    },
    "gpt_neo": {
        **_SIZES, "attention_types": [[["global", "local"], 1]], "window_size": 7, "intermediate_size": 40,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {**_SIZES, "intermediate_size": 48, **_rope(partial_rotary_factor=0.5)},
    "gpt_neox sequential": {
        **_SIZES, "intermediate_size": 48, "use_parallel_residual": False, "attention_bias": False,
    },
    "gpt_neox odd rotary width": {
        **_SIZES, "hidden_size": 40, "intermediate_size": 48, **_rope(partial_rotary_factor=0.5),
    },
    "gpt_bigcode": {**_GPT2, "n_inner": 40},
    "gpt_bigcode multi-head, scores not scaled": {**_GPT2, "multi_query": False, "scale_attn_weights": False},
    "opt": {**_SIZES, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32},
    "opt post-norm, narrow embedding": {
        **_SIZES, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 16, "do_layer_norm_before": False,
    },
    "bloom": {**_SIZES, "seq_length": 96},
    "mpt six heads, clipped": {
        **_SIZES, "hidden_size": 36, "n_heads": 6, "max_seq_len": 96, "attn_config": {"clip_qkv": 0.3},
    },
    "falcon multi-query": {**_SIZES, "ffn_hidden_size": 48},
    "falcon grouped": {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon alibi": {
        **_SIZES, "alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True,
        "ffn_hidden_size": 48,
    },
    "llama llama3 rope, wide heads": {
        **_LLAMA, "head_dim": 10,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=24),
    },
    "llama tied, with biases, dynamic rope": {
        **_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "pretraining_tp": 2,
        **_rope("dynamic", factor=2.0),
    },
    "mistral": {**_LLAMA, "sliding_window": 7},
    "mixtral": {**_LLAMA, "num_local_experts": 4, **_EXPERTS},
    "qwen2": {
        **_LLAMA, "use_sliding_window": True, "sliding_window": 6, "layer_types": _PAIR[::-1],
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        **_LLAMA, **_EXPERTS, "num_experts": 5, "moe_intermediate_size": 12, "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 20, "mlp_only_layers": [0],
    },
    "qwen3 yarn": {**_LLAMA, "head_dim": 12, "rope_parameters": _YARN},
    "qwen3_moe": {
        **_LLAMA, **_EXPERTS, "head_dim": 8, "num_experts": 5, "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
    "gemma": {**_LLAMA, "head_dim": 12},
    "gemma2": {
        **_LLAMA, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": _PAIR,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_LLAMA, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": _PAIR,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
        },
    },
    "phi": {**_GPT2, "intermediate_size": 48, "num_key_value_heads": 2, **_rope(partial_rotary_factor=0.5)},
    "phi head norms": {
        **_GPT2, "intermediate_size": 48, "num_key_value_heads": 2, "qk_layernorm": True,
        **_rope(partial_rotary_factor=0.5),
    },
    "phi3 longrope": {
        **_LLAMA, "resid_pdrop": 0.0, "original_max_position_embeddings": 64,
        **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 4.0], long_factor=[1.0, 2.0, 8.0, 16.0],
                original_max_position_embeddings=64),
    },
    "stablelm parallel, head norms": {
        **_LLAMA, "use_parallel_residual": True, "qk_layernorm": True, **_rope(partial_rotary_factor=0.5),
    },
    "stablelm": {**_LLAMA, "use_qkv_bias": True, **_rope(partial_rotary_factor=0.25)},
    "starcoder2": {**_LLAMA, "sliding_window": 9},
    "olmo": {**_LLAMA, "clip_qkv": 0.2},
    "olmo2": _LLAMA,
    "olmoe clipped": {**_LLAMA, **_EXPERTS, "num_experts": 4, "intermediate_size": 12, "clip_qkv": 0.5},
    "granite": {
        **_LLAMA, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 6.0,
    },
    "cohere": _LLAMA,
    "cohere head norms": {**_LLAMA, "use_qk_norm": True, "logit_scale": 0.5},
    "ernie4_5": {**_LLAMA, "head_dim": 10, "use_bias": True},
    "glm4": {**_LLAMA, "head_dim": 8, **_rope(partial_rotary_factor=0.5)},
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 0]},
    "gpt_oss": {
        **_LLAMA, **_EXPERTS, "head_dim": 8, "num_local_experts": 4, "intermediate_size": 12,
        "sliding_window": 6, "layer_types": _PAIR, "rope_parameters": {**_YARN, "truncate": False},
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def cases():
    return CASES


def make_transformer(case):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.split()[0]](**CASES[case])
    # Their eager Falcon adds the ALiBi bias twice: once to the mask, once to the scores.
    attention = "sdpa" if case == "falcon alibi" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # zero biases and unit scales would hide a wrong one
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return model.eval()


# Variants whose parts the default cases hold, too, and families that few people train today.
RARE = {
    "gpt2 untied, exact gelu", "gpt2 scores divided by layer", "gpt_neo", "gpt_neox sequential",
    "gpt_neox odd rotary width", "gpt_bigcode", "gpt_bigcode multi-head, scores not scaled",
    "opt post-norm, narrow embedding", "falcon multi-query", "falcon alibi", "phi head norms", "stablelm",
    "olmo", "cohere", "starcoder2", "gptj",
}  # fmt: skip


def _slow_where_rare(case):
    return pytest.param(case, marks=pytest.mark.slow) if case in RARE else case


@pytest.fixture(scope="module", params=map(_slow_where_rare, CASES))
def transformer(request, tmp_path_factory):
    """(their model, the folder it was saved to)"""
    model = make_transformer(request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder
