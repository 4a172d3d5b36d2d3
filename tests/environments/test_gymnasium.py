"""Gymnasium's own environments in words, against their rules."""

import random

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.gymnasium import Gymnasium

gymnasium = pytest.importorskip("gymnasium")

LAKE = {
    "id": "FrozenLake-v1",
    "arguments": {"is_slippery": False},
    "actions": ("left", "down", "right", "up"),
}


class Echo(gymnasium.Env):
    """Draws a word to repeat; pays for it, and breaks off at the third step."""

    observation_space = gymnasium.spaces.Text(20)
    action_space = gymnasium.spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        self.word = "ab"[self.np_random.integers(2)] * 3
        return self.word, {}

    def step(self, action):
        self.left -= 1
        return f"{self.left} left", float(action == self.word), False, self.left == 0, {}


def words(steps):
    return [step.messages[0]["content"] for step in steps]


def test_the_shortest_way_over_the_lake_pays_one():
    game = Gymnasium(**LAKE, instructions="Cross the lake.").make()
    assert game.reset(0) == [{"role": "user", "content": "Cross the lake.\n\n0"}]
    steps = [game.step(word) for word in ("down", "down", "right", "right", "down", "right")]
    assert words(steps) == ["4", "8", "9", "10", "14", "15"]
    assert [step.reward for step in steps] == [0.0] * 5 + [1.0]
    assert [step.terminated for step in steps] == [False] * 5 + [True]
    game.close()


def test_a_hole_ends_the_way_without_reward_and_a_time_limit_is_a_truncation():
    game = Gymnasium(**LAKE).make()
    game.reset(0)
    game.step("right")
    assert game.step("down")[1:4] == (0.0, True, False)  # place 5 is a hole
    game.reset(0)
    steps = [game.step("left") for _ in range(100)]
    assert [step.truncated for step in steps] == [False] * 99 + [True]
    assert not any(step.terminated for step in steps)
    game.close()


def test_states_have_words_or_a_picture():
    places = tuple(f"place {number}" for number in range(16))
    game = Gymnasium(**LAKE, observations=places).make()
    assert game.reset(0)[0]["content"] == "place 0"
    assert words([game.step("right")]) == ["place 1"]
    game.close()
    drawn = Gymnasium(**LAKE, render=True).make()
    first = drawn.reset(0)[0]["content"]
    assert "FHFH" in first.replace("\x1b[41m", "").replace("\x1b[0m", "")
    assert "(Right)" in drawn.step("right").messages[0]["content"]
    drawn.close()


def test_an_answer_that_is_no_action_changes_nothing():
    game = Gymnasium(**LAKE).make()
    game.reset(0)
    for answer in ("", "Left", "left right", "2", "jump"):
        messages, *rest = game.step(answer)
        assert messages[0]["content"] == "This is no action. Answer with one of: left, down, right, up."
        assert rest == [0.0, False, False, {"invalid_actions": 1}]
    assert words([game.step(" down\n")]) == ["4"]
    game.close()


def test_the_seed_decides_what_is_drawn_and_nothing_outside_is_touched():
    slippery = {**LAKE, "arguments": {"is_slippery": True}}

    def walk(seed):
        game = Gymnasium(**slippery).make()
        game.reset(seed)
        said = words([game.step("right") for _ in range(8)])
        game.close()
        return said

    before = random.getstate()
    assert walk(1) == walk(1)
    assert len({tuple(walk(seed)) for seed in range(6)}) > 1
    assert random.getstate() == before


def test_a_text_space_takes_the_answer_as_it_is():
    game = Gymnasium(factory=Echo).make()
    word = game.reset(4)[0]["content"]
    steps = [game.step(word), game.step(word[1:]), game.step(word)]
    assert [step.reward for step in steps] == [1.0, 0.0, 1.0]
    assert [step.truncated for step in steps] == [False, False, True]
    assert game.step("x" * 21).info == {"invalid_actions": 1}  # not in the space
    assert {Gymnasium(factory=Echo).make().reset(seed)[0]["content"] for seed in range(9)} == {"aaa", "bbb"}
    game.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"id": "FrozenLake-v1"}, r"actions must be words for 4 actions of Discrete\(4\), got 0"),
        ({"id": "CartPole-v1", "actions": ("a", "b")}, "an observation must be a text, got ndarray of Box"),
        ({"id": "Pendulum-v1"}, "actions must be words for a Text space, not Box"),
    ],
)
def test_spaces_without_words_are_one_line(settings, problem):
    with pytest.raises(UserError, match=problem):
        Gymnasium(**settings).make().reset(0)
