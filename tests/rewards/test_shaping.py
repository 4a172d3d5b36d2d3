"""The win rate against an opponent: zero-sum, and the numbers of small cases."""

import math

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import RewardError, evaluate_reward
from hybrid_jax.rewards.shaping import WinRate
from hybrid_jax.rewards.tokens import TokenLength


def number(prompts, responses, bonus=None):
    return [float(text) + (b or 0) for text, b in zip(responses, bonus or [0] * len(responses), strict=True)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_it_is_the_mean_probability_to_win_less_a_half():
    columns = {"opponents": [["1", "3"], "4"], "bonus": [100, -100]}  # the bonus of a row cancels
    scores = evaluate_reward("win", WinRate(number, scale=2.0), ["p", "q"], ["2", "4"], columns)
    assert scores.tolist() == pytest.approx([(sigmoid(0.5) + sigmoid(-0.5)) / 2 - 0.5, 0.0], abs=1e-7)
    assert WinRate(number)(["p"], ["1000"], opponents=["-1000"]) == [0.5]


def test_a_batch_of_self_play_sums_to_zero():
    values = [str(x) for x in np.random.default_rng(0).normal(size=5).round(3)]
    everyone = [values] * 5  # each against all, itself too
    scores = WinRate(number)([""] * 5, values, opponents=everyone)
    assert sum(scores) == pytest.approx(0.0, abs=1e-12)
    assert max(scores) > 0.1
    pair = WinRate(number)(["", ""], values[:2], opponents=[values[1], values[0]])
    assert sum(pair) == pytest.approx(0.0, abs=1e-12)


def test_a_preference_is_asked_pair_by_pair():
    def longer(prompts, responses, references):
        assert all(len(texts) == 1 for texts in references)
        lengths = [
            (len(response), len(texts[0])) for response, texts in zip(responses, references, strict=True)
        ]
        return [0.5 * (a > b) + 0.5 * (a >= b) for a, b in lengths]

    reward = WinRate(longer, kind="preference")
    assert reward([""] * 2, ["aa", "a"], opponents=[["b", "bb", "bbb"], "bb"]) == [0.0, -0.5]
    with pytest.raises(RewardError, match=r"a preference must be in \[0, 1\]; set kind to scores"):
        evaluate_reward("w", WinRate(number, kind="preference"), [""], ["3"], {"opponents": ["1"]})


def test_mistakes_are_one_clear_line():
    with pytest.raises(UserError, match="the data must have the column 'opponents', got no columns"):
        WinRate(number)([""], ["1"])
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        WinRate(number, scale=0.0)
    with pytest.raises(ValueError, match="reward must be one on texts"):
        WinRate(TokenLength(target=2))
