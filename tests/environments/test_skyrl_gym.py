"""Environments of skyrl-gym on GSM8K, against its own rules for rewards."""

import itertools
import json
from pathlib import Path

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.skyrl_gym import SkyRLGym

pytest.importorskip("skyrl_gym")
ROW = {"prompt": "What is 2 + 3?", "final_answer": 5}


def own(env_config, extras):
    """A factory of ones own."""
    from skyrl_gym.envs.gsm8k.env import GSM8kEnv

    assert env_config == {"a": 1}
    return GSM8kEnv(env_config, extras)


def test_gsm8k_in_one_turn_pays_for_the_number_behind_the_mark():
    game = SkyRLGym(id="gsm8k", answer_column="final_answer").make()
    for answer, reward in (
        ("#### 5", 1.0),
        ("5", 0.0),
        ("It is #### 5.", 0.0),
        ("so #### 5", 1.0),
        ("#### 6", 0.0),
    ):
        assert game.reset(0, **ROW) == [{"role": "user", "content": "What is 2 + 3?"}]
        assert game.step(answer) == ([], reward, True, False, {})
    game.close()


def test_several_turns_pay_for_the_form_until_the_answer_is_right():
    """A wrong number in the right form earns 0.2 / max_turns, and the turn before the last asks for less."""
    game = SkyRLGym(id="gsm8k_multi_turn", answer_column="final_answer", extras={"max_turns": 4}).make()
    game.reset(0, **ROW)
    steps = [game.step(text) for text in ("hm", "#### 4", "#### 6", "#### 5")]
    assert [step.reward for step in steps] == pytest.approx([0.0, 0.05, 0.05, 1.0])
    assert [step.terminated for step in steps] == [False, False, False, True]
    assert "step-by-step" in steps[0].messages[0]["content"]
    assert steps[2].messages[0]["content"].startswith("Now provide only the final numeric answer")
    game.reset(0, **ROW)
    assert game.step("#### 5")[1:4] == (1.0, True, False)
    game.close()


def test_rows_of_skyrl_have_messages_and_the_rule_of_the_reward():
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "2 + 2?"}]
    game = SkyRLGym(id="gsm8k").make()
    assert game.reset(3, prompt=messages, reward_spec={"ground_truth": "4"}) == messages
    assert game.step("#### 4").reward == 1.0
    game.close()


def test_a_factory_of_ones_own_gets_the_config_and_the_row():
    game = SkyRLGym(factory=own, env_config={"a": 1}, answer_column="final_answer").make()
    game.reset(0, **ROW)
    assert game.step("#### 5").reward == 1.0


def test_the_solutions_of_gsm8k_are_right_over_the_data():
    file = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not file.is_file():
        pytest.skip("no GSM8K beside the checkout")
    rows = [json.loads(line) for line in file.read_text().splitlines()[:200]]
    settings = SkyRLGym(id="gsm8k", prompt_column="question", answer_column="final_answer")
    game, earned, wrong = settings.make(), 0.0, 0.0
    for row, other in itertools.pairwise(rows):
        for text in (row["answer"], other["answer"]):
            game.reset(0, **row)
            reward = game.step(text).reward
            if text is row["answer"]:
                earned += reward
            else:
                wrong += reward
    assert earned == 199
    assert wrong < 10


@pytest.mark.parametrize("name", ["lcb", "searchcode", "text2sql"])
def test_ids_that_run_what_the_model_writes_are_refused(name):
    with pytest.raises(UserError, match=f"env.id must be one that runs no code of the model's, got '{name}'"):
        parse(SkyRLGym, {"id": name}, "env")


def test_a_column_that_no_row_has_is_one_line():
    with pytest.raises(UserError, match="a row has no column 'answr'; did you mean 'answer'"):
        SkyRLGym(id="gsm8k", answer_column="answr").make().reset(0, prompt="1?", answer="1")
