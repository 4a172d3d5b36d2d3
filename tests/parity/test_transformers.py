"""Each family against `transformers`: logits, loss, every gradient, greedy decoding, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import dump_weights
from hybrid_jax.models.hf import load_pretrained, save_pretrained
from hybrid_jax.sampling.decode import generate

VOCAB = 61


def _batch():
    """Left-padded rows of 24 tokens, and one full one."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 24))
    return tokens, np.arange(24)[None] >= np.array([[0], [7], [15]])


def _their_inputs(tokens, mask):
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    names = {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "position_ids": positions}
    return {name: torch.as_tensor(array) for name, array in names.items()}


def _our_loss(model, tokens, mask):
    """Mean negative log-likelihood of every real token that a real token precedes."""

    def loss(params):
        log_probs = jax.nn.log_softmax(
            model.apply(params, jnp.asarray(tokens), jnp.asarray(mask)).logits[:, :-1]
        )
        chosen = jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], 2)[..., 0]
        return -jnp.sum(jnp.where(mask[:, :-1], chosen, 0.0)) / mask[:, :-1].sum()

    return loss


def test_logits_loss_and_all_gradients_equal_those_of_transformers(transformer):
    theirs, folder = transformer
    model, params = load_pretrained(folder)
    tokens, mask = _batch()
    logits = theirs(**_their_inputs(tokens, mask)).logits
    ours = jax.jit(model.apply)(params, jnp.asarray(tokens), jnp.asarray(mask)).logits
    np.testing.assert_allclose(np.asarray(ours)[mask], logits.detach().numpy()[mask], atol=1e-4, rtol=1e-4)

    targets = torch.as_tensor(np.where(mask[:, :-1], tokens[:, 1:], -100))
    their_loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets.reshape(-1))
    theirs.zero_grad()
    their_loss.backward()
    loss, gradients = jax.jit(jax.value_and_grad(_our_loss(model, tokens, mask)))(params)
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    # The weight table maps gradients as it maps weights: every row is linear.
    named = dict(dump_weights(FAMILIES[theirs.config.model_type], model, gradients))
    their_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert named.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        error = np.abs(named[name] - gradient).max() / max(np.abs(gradient).max(), 1e-6)
        # the keys' biases have gradient 0: a softmax does not see a constant
        assert error <= 1e-4 or np.abs(gradient).max() < 1e-6, name


def test_greedy_decoding_gives_the_same_32_tokens(transformer):
    theirs, folder = transformer
    model, params = load_pretrained(folder)
    tokens, mask = _batch()
    inputs = _their_inputs(tokens, mask)
    del inputs["position_ids"]
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=32, pad_token_id=0)[:, 24:]
    samples = generate(
        model,
        params,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        jax.random.key(0),
        max_new_tokens=32,
        temperature=0,
    )
    np.testing.assert_array_equal(samples.tokens, expected)


def test_an_exported_folder_gives_transformers_the_same_model(transformer, tmp_path):
    theirs, folder = transformer
    model, params = load_pretrained(folder)
    save_pretrained(tmp_path, model, params, eos_ids=(3,))
    back, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(theirs)
    assert (back.generation_config.eos_token_id, back.config.eos_token_id) == (3, 3)
    inputs = _their_inputs(*_batch())
    with torch.no_grad():
        np.testing.assert_array_equal(back.eval()(**inputs).logits, theirs(**inputs).logits)
    again, again_params = load_pretrained(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, again_params, params)


def test_a_decoder_from_scratch_is_a_gpt2_for_transformers(tmp_path):
    model = DecoderConfig(num_layers=2, width=32, num_heads=4, max_length=48, dropout=0.1).build(VOCAB)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    tokens, mask = _batch()
    with torch.no_grad():
        expected = theirs(**_their_inputs(tokens, mask)).logits.numpy()
    logits = jax.jit(model.apply)(params, jnp.asarray(tokens), jnp.asarray(mask)).logits
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-5)
