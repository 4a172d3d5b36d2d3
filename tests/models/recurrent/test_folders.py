"""Folders of recurrent families: `transformers` reads what we write and scores as we do, and the other way."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from hybrid_jax import load_pretrained, save_pretrained
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.folders.pretrained import has_format
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mamba2 import Mamba2

V, T = 19, 21
TOKENS = np.random.default_rng(0).integers(0, V, (3, T))
STARTS = np.array([0, 5, 12])
MASK = np.arange(T) >= STARTS[:, None]
THEIRS = {
    "plain": {"head_dim": 8, "n_groups": 2},
    "tied, with biases": {"head_dim": 4, "n_groups": 1, "tie_word_embeddings": True, "use_bias": True},
    "no bias of the convolution": {"head_dim": 16, "n_groups": 2, "use_conv_bias": False, "expand": 4},
}


def _peer(settings, folder):
    """A model of `transformers` with weights large enough that every one matters."""
    settings = {"expand": 2, "conv_kernel": 3, "chunk_size": 8, "layer_norm_epsilon": 1e-3, **settings}
    config = Mamba2Config(
        hidden_size=16,
        state_size=6,
        num_hidden_layers=2,
        vocab_size=V,
        num_heads=16 * settings["expand"] // settings["head_dim"],
        **settings,
    )
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _scores(model, mask=None):
    mask = None if mask is None else torch.as_tensor(mask).long()
    return model(torch.as_tensor(TOKENS), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("kind", THEIRS)
def test_a_mamba2_of_transformers_scores_the_same_and_comes_back(kind, tmp_path):
    peer = _peer(THEIRS[kind], tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    expected = _scores(peer)
    np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS).logits, expected, atol=1e-4)
    save_pretrained(tmp_path / "ours", model, params, eos_ids=[3])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (type(back), back.config.eos_token_id) == (Mamba2ForCausalLM, 3)
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)
    if "bias" in kind and "tied" in kind:
        return  # with biases of the maps, the padding of `transformers` enters its convolution
    padded = jax.jit(model.apply)(params, TOKENS, MASK).logits
    np.testing.assert_allclose(padded[MASK], _scores(peer, MASK)[MASK], atol=1e-4)


def test_a_run_begins_from_such_a_folder_and_its_steps_score_as_the_peer(tmp_path):
    peer = _peer(THEIRS["plain"], tmp_path)
    model = BACKBONES["pretrained"](str(tmp_path), dropout=0.1).build(V)
    params = model.init(jax.random.key(0))
    expected = _scores(peer, MASK)
    scores, cache = jax.jit(model.prefill)(params, TOKENS[:, :15], MASK[:, :15], model.init_cache(3, T))
    step = jax.jit(model.step)
    for t in range(15, T):
        np.testing.assert_allclose(scores, expected[:, t - 1], atol=1e-4)
        scores, cache = step(params, TOKENS[:, t], cache)
    np.testing.assert_allclose(scores, expected[:, -1], atol=1e-4)
    larger = BACKBONES["pretrained"](str(tmp_path), resize_vocabulary=True).build(V + 2)
    assert larger.init(jax.random.key(0))["lm_head"]["kernel"].shape == (16, V + 2)


def test_an_infinite_limit_is_read_as_older_versions_wrote_it_and_written_as_newer_ones_do(tmp_path):
    _peer(THEIRS["plain"], tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_step_limit": [0.0, float("inf")]}))
    assert "Infinity]" in file.read_text().replace("\n", "")
    save_pretrained(tmp_path / "ours", *load_pretrained(tmp_path))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_a_model_of_ours_is_written_as_theirs_if_they_can_express_it(tmp_path):
    assert has_format(Mamba2(width=8, head_width=4, dropout=0.2).build(V))
    assert not has_format(Mamba2(width=8, head_width=4, mlp_width=8).build(V))
    assert not has_format(LSTM(width=8).build(V))
    with pytest.raises(UserError, match="a model of LSTM settings has no Hugging Face format"):
        save_pretrained(tmp_path, LSTM(width=8).build(V), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit must be \(0\.0, inf\), got \(0\.0, 0\.1\)"),
        ({"hidden_act": "relu"}, "hidden_act must be silu, got 'relu'"),
        ({"num_heads": 5}, r"hidden_size \* expand \(32\) must equal num_heads \* head_dim"),
        (
            {"conv_kernel": 4},
            r"gives layer_0/cell/convolution/taps the shape \[3, 56\], the config says \[4, 56\]",
        ),
    ],
)
def test_a_folder_that_is_not_understood_is_one_line(change, message, tmp_path):
    _peer(THEIRS["plain"], tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_settings_that_a_recurrent_folder_does_not_have_are_refused(tmp_path):
    _peer(THEIRS["plain"], tmp_path)
    with pytest.raises(UserError, match="dtype must be float32 for a recurrent model, got bfloat16"):
        load_pretrained(tmp_path, dtype="bfloat16")
    with pytest.raises(UserError, match=r"model\.dtype must be float32 for the recurrent model of"):
        BACKBONES["pretrained"](str(tmp_path), dtype="bfloat16").build(V)
