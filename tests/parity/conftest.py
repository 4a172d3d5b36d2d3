"""Tiny random models of `transformers`, saved to folders, one for each family and its variants."""

import pytest

VARIANTS = ("gpt2", "gpt2 untied, exact gelu", "llama", "llama tied, with biases")


def make_transformer(variant):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if variant.startswith("gpt2"):
        other = {"activation_function": "gelu", "tie_word_embeddings": False} if "untied" in variant else {}
        config = GPT2Config(
            n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=96,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **other,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        tied = "tied" in variant
        config = LlamaConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
            intermediate_size=48, vocab_size=61, max_position_embeddings=96, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attention_bias=tied, mlp_bias=tied, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    with torch.no_grad():  # zero biases and unit scales would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session", params=VARIANTS)
def transformer(request, tmp_path_factory):
    """(their model, the folder it was saved to)"""
    model = make_transformer(request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder
