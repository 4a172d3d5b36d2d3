"""Tree search on the 27 responses, whose best one and whose weights at the root are known."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.classifier import Classifier, save_classifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.tree_search import TreeSearch
from hybrid_jax.testing import SEQUENCES, PrefixTable, reference_params, sequence_probabilities, true_reward

REWARD = TokenCount(weights={2: 1.0}, first_token_weights={1: -0.5})  # `true_reward`
PROMPTS = jnp.zeros((3, 1), jnp.int32)


def answers(seed: int = 0, **settings) -> tuple[np.ndarray, np.ndarray]:
    sampler = TreeSearch(max_new_tokens=3, **settings)
    key = jax.random.key(seed)
    samples = sample(sampler, PrefixTable(), reference_params(), PROMPTS, PROMPTS == 0, key)
    assert samples.log_probs is None
    return np.asarray(samples.tokens), np.asarray(samples.action_mask)


def test_with_enough_simulations_every_row_says_the_best_response(mctx):
    tokens, mask = answers(reward=REWARD, simulations=64)
    assert tokens.tolist() == [[2, 2, 2]] * 3
    assert mask.all()


@pytest.mark.slow
def test_the_log_probs_of_tokens_count_as_much_as_beta_says(mctx):
    """The best response by r + β log p is found by looking at all of them."""
    for beta in (0.5, 2.0):
        worth = true_reward() + beta * np.log(sequence_probabilities(reference_params()))
        tokens, _ = answers(reward=REWARD, simulations=200, beta=beta, noise=0.0)
        assert tokens[0].tolist() == SEQUENCES[worth.argmax()].tolist()
    likeliest, _ = answers(simulations=200, beta=1.0, noise=0.0)
    assert likeliest[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("simulations", "weights"),
    [
        pytest.param(8, [0.5, 0.3, 0.2], marks=pytest.mark.slow),
        (32, [0.0131, 0.0025, 0.9845]),
        pytest.param(128, [1e-4, 0.0018, 0.9981], marks=pytest.mark.slow),
    ],
)
def test_the_weights_at_the_root_are_known(simulations, weights, mctx, monkeypatch):
    """At eight simulations they are still the prior; then those of the package's own search on this tree."""
    found, search = [], mctx.gumbel_muzero_policy

    def spied(*inputs, **settings):
        policy = search(*inputs, **settings)
        jax.debug.callback(
            lambda weights: found.append(np.asarray(weights)), policy.action_weights, ordered=True
        )
        return policy

    monkeypatch.setattr(mctx, "gumbel_muzero_policy", spied)
    answers(reward=REWARD, simulations=simulations, noise=0.0)
    jax.effects_barrier()
    np.testing.assert_allclose(found[0], [weights] * 3, atol=6e-5)


def test_what_ends_early_is_found_and_nothing_is_said_behind_it(mctx):
    """With token 1 as the end and a reward for being short the best response is the end alone."""
    short = TokenCount(weights={0: -1.0, 2: -1.0, 1: 1.0})
    sampler = TreeSearch(max_new_tokens=3, reward=short, simulations=64)
    key = jax.random.key(0)
    samples = sample(sampler, PrefixTable(), reference_params(), PROMPTS, PROMPTS == 0, key, eos_ids=(1,))
    assert samples.tokens.tolist() == [[1, 0, 0]] * 3
    assert samples.action_mask.tolist() == [[True, False, False]] * 3


def test_a_value_of_a_folder_leads_the_search(mctx, tmp_path):
    """Where p says nothing and each beginning was looked at, the first token has the highest value."""
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, vocab_size=5, max_length=8).build()
    params = model.init(jax.random.key(0))
    params = jax.tree.map(jnp.zeros_like, params)
    critic = Classifier(replace(model.config, init_std=0.5), labels=("value",), has_bias=True)
    weights = critic.init(jax.random.key(1))
    save_classifier(tmp_path / "value", critic, weights)
    prompts = jnp.array([[0, 3], [1, 2]])
    mask = jnp.array([[False, True], [True, True]])
    settings = {"value": str(tmp_path / "value"), "simulations": 40, "noise": 0.0}
    samples = sample(TreeSearch(max_new_tokens=2, **settings), model, params, prompts, mask, jax.random.key(2))
    for prompt, answer in zip(([3], [1, 2]), np.asarray(samples.tokens), strict=True):
        # A response is worth what was said of it before its last token, so the first one decides.
        worth = [_value(critic, weights, [*prompt, token]) for token in range(5)]
        assert answer[0] == np.argmax(worth)


def _value(critic, weights, tokens) -> float:
    row = jnp.array([tokens])
    return float(critic.apply(weights, row, jnp.ones(row.shape, bool))[0, 0])


def test_nothing_to_search_for_texts_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="tree_search needs a reward, a value, or beta above 0, got none"):
        TreeSearch()
    monkeypatch.setitem(sys.modules, "mctx", None)
    with pytest.raises(UserError, match="sampler tree_search needs mctx, which is not installed: pip"):
        answers(reward=REWARD)


def test_a_reward_on_texts_is_refused(mctx):
    with pytest.raises(UserError, match=r"sampler.reward must be one on tokens here"):
        answers(reward=lambda prompts, responses: [0.0] * len(responses))


@pytest.fixture(scope="module")
def mctx():
    return pytest.importorskip("mctx")
