"""Each family against `transformers`: logits, loss, every gradient, greedy decoding, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax import lax

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained

VOCAB, PROMPT, NEW, PADS = 61, 24, 32, 7
# Parity is about numbers, not speed: the compiler may skip its expensive passes.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def ours(transformer):
    return load_pretrained(transformer[1])


@pytest.fixture(scope="module")
def continued(transformer):
    """Prompts of three lengths, left-padded, as their model continues them: (tokens, mask) [3 56].

    The second one is the start of the first, behind padding.
    """
    theirs, _ = transformer
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (3, PROMPT))
    tokens[1, PADS:] = tokens[0, :-PADS]
    mask = np.arange(PROMPT)[None] >= np.array([[0], [PADS], [15]])
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask.astype(np.int64))}
    whole = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return whole.numpy(), np.concatenate([mask, np.ones((3, NEW), bool)], 1)


def _their_logits(theirs, tokens, mask):
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask.astype(np.int64))}
    if theirs.config.model_type not in ("bloom", "mpt"):  # these count positions by themselves
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        inputs["position_ids"] = torch.as_tensor(positions)
    return theirs(**inputs, use_cache=False).logits


def _loss(model, params, tokens, mask):
    """Mean negative log-likelihood of every real token that a real token precedes; and the logits."""
    logits = model.apply(params, tokens, mask).logits
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], 2)[..., 0]
    return -jnp.sum(jnp.where(mask[:, :-1], chosen, 0.0)) / mask[:, :-1].sum(), logits


def _relative_error(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_logits_loss_all_gradients_and_decoding_equal_those_of_transformers(
    transformer, ours, continued, tmp_path
):
    (theirs, _), (model, params), (tokens, mask) = transformer, ours, continued
    differentiated = jax.jit(
        jax.value_and_grad(lambda *args: _loss(model, *args), has_aux=True), compiler_options=FAST_COMPILE
    )
    (loss, logits), gradients = differentiated(params, tokens, mask)

    their_logits = _their_logits(theirs, tokens, mask)
    assert _relative_error(np.asarray(logits)[mask], their_logits.detach().numpy()[mask]) < 1e-4
    targets = torch.as_tensor(np.where(mask[:, :-1], tokens[:, 1:], -100))
    their_loss = torch.nn.functional.cross_entropy(their_logits[:, :-1].reshape(-1, VOCAB), targets.reshape(-1))
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)

    padded, plain = np.asarray(logits)[1, PADS:PROMPT], np.asarray(logits)[0, : PROMPT - PADS]
    assert _relative_error(padded, plain) < 1e-5

    theirs.zero_grad()
    their_loss.backward()
    expected = _their_gradients(theirs, tmp_path)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        wanted = np.asarray(_at(expected, path))
        # the keys' biases have gradient 0: a softmax does not see a constant
        error = np.abs(np.asarray(gradient) - wanted).max()
        assert error <= 1e-4 * np.abs(wanted).max() + 1e-7 * largest, (path, error, np.abs(wanted).max())

    _check_decoding(model, params, tokens, mask, np.asarray(logits))


def _their_gradients(theirs, folder):
    """Their gradients in our tree: saved and loaded as if they were weights, for every row is linear."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            kept = parameter.data
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(kept)
            parameter.kept = kept
        theirs.save_pretrained(folder)
        for parameter in theirs.parameters():
            parameter.data = parameter.kept
    return load_pretrained(folder)[1]


def _at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def _check_decoding(model, params, tokens, mask, logits):
    """Greedy decoding out of the cache gives their tokens, by the scores of the whole forward pass."""

    def decode(params, prompt, prompt_mask):
        def step(carry, _):
            scores, cache = carry
            after, cache = model.step(params, jnp.argmax(scores, -1), cache)
            return (after, cache), scores

        cache = model.init_cache(prompt.shape[0], PROMPT + NEW)
        carry = model.prefill(params, prompt, prompt_mask, cache)
        return lax.scan(step, carry, length=NEW)[1]

    decode = jax.jit(decode, compiler_options=FAST_COMPILE)
    scores = np.asarray(decode(params, tokens[:, :PROMPT], mask[:, :PROMPT])).swapaxes(0, 1)
    np.testing.assert_array_equal(scores.argmax(-1), tokens[:, PROMPT:])
    assert _relative_error(scores, logits[:, PROMPT - 1 : -1]) < 1e-4


def test_an_exported_folder_gives_transformers_the_same_model(transformer, ours, continued, tmp_path):
    (theirs, _), (model, params), (tokens, mask) = transformer, ours, continued
    save_pretrained(tmp_path, model, params, eos_ids=(3,))
    back, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=theirs.config._attn_implementation
    )
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(theirs)
    assert (back.generation_config.eos_token_id, back.config.eos_token_id) == (3, 3)
    with torch.no_grad():
        expected = _their_logits(theirs, tokens, mask)
        assert _relative_error(_their_logits(back.eval(), tokens, mask).numpy(), expected.numpy()) < 1e-5
    again, again_params = load_pretrained(tmp_path)
    assert again.config.resolved() == model.config.resolved()
    jax.tree.map(np.testing.assert_array_equal, again_params, params)


def test_a_decoder_from_scratch_is_a_gpt2_for_transformers(tmp_path):
    model = DecoderConfig(num_layers=2, width=32, num_heads=4, max_length=96, dropout=0.1).build(VOCAB)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, PROMPT))
    mask = np.arange(PROMPT)[None] >= np.array([[0], [7], [15]])
    with torch.no_grad():
        expected = _their_logits(theirs, tokens, mask).numpy()
    logits = jax.jit(model.apply)(params, jnp.asarray(tokens), jnp.asarray(mask)).logits
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-5)
