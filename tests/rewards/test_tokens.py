import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import DeviceReward
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount, TokenLength


def test_the_reward_of_the_27_sequence_model_is_a_config():
    """R(s) = #(2 in s) - 0.5 [s0 == 1] over all sequences of three tokens out of three."""
    settings = {"name": "token_count", "weights": {2: 1.0}, "first_token_weights": {1: -0.5}}
    reward = parse(CompositeReward, {"parts": {"r": {"reward": settings}}})
    responses = np.array(list(itertools.product(range(3), repeat=3)))
    tokens = np.concatenate([np.full((27, 1), 2), responses], axis=1)  # the prompt's token 2 does not count
    scores = reward.score_tokens(jnp.array(tokens), jnp.ones((27, 4), bool), jnp.ones((27, 3), bool))
    expected = [sum(token == 2 for token in s) - 0.5 * (s[0] == 1) for s in responses.tolist()]
    assert scores.dtype == jnp.float32
    assert scores.tolist() == expected
    assert scores[26] == 3.0  # 2 2 2
    assert scores[14] == 0.5  # 1 1 2


def test_token_count_ignores_padding_and_the_prompt():
    tokens = jnp.array([[7, 7, 7, 5, 7], [5, 5, 7, 7, 7]])
    response_mask = jnp.array([[True, True, False], [True, False, False]])
    reward = TokenCount({7: 1.5, 5: -2.0}, {7: 10.0})
    assert reward.score_tokens(tokens, jnp.ones((2, 5), bool), response_mask).tolist() == [9.5, 11.5]


def test_token_count_of_an_empty_response_is_zero():
    reward = TokenCount({0: 1.0}, {0: 1.0})
    assert reward.score_tokens(jnp.zeros((1, 4), int), jnp.ones((1, 4), bool), jnp.zeros((1, 2), bool)) == 0.0


def test_token_length_is_the_distance_to_the_target():
    masks = jnp.arange(4)[None] < jnp.array([0, 1, 3, 4])[:, None]
    scores = TokenLength(target=3, scale=2.0).score_tokens(
        jnp.zeros((4, 6), int), jnp.ones((4, 6), bool), masks
    )
    assert scores.tolist() == [-1.5, -1.0, 0.0, -0.5]


def test_token_weights_survive_the_config_and_overrides():
    count = parse(TokenCount, {"weights": {"2": 1, 3: 0.5}})
    assert count.weights == {2: 1.0, 3: 0.5}
    assert parse(TokenCount, to_dict(count, TokenCount)) == count


def test_device_rewards_run_under_jit_and_vmap():
    reward = CompositeReward({"a": Part(TokenCount({1: 1.0})), "b": Part(TokenLength(2))})
    assert isinstance(reward, DeviceReward)
    tokens = jnp.array([[[0, 1, 1], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]])
    masks = jnp.ones((2, 2, 3), bool)
    scores = jax.jit(jax.vmap(reward.score_tokens))(tokens, masks, masks[:, :, 1:])
    assert scores.tolist() == [[2.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (TokenCount, {"weights": {"two": 1.0}}, r"weights\['two'\] must be a whole number"),
        (TokenCount, {"weights": {-1: 1.0}}, r"weights\[-1\] must be at least 0, got -1"),
        (TokenCount, {"weights": {1: "much"}}, "weights.1"),
        (TokenLength, {"target": -1}, "target must be at least 0, got -1"),
        (TokenLength, {"target": 1, "scale": 0}, "scale must be above 0, got 0"),
    ],
)
def test_impossible_settings_are_refused(cls, settings, said):
    with pytest.raises(UserError, match=said):
        parse(cls, settings)
