"""What may go wrong in a user's reward, and the one line that says so."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import RewardError, column_names, columns_of, evaluate_reward

PROMPTS = ["p", "q"]
RESPONSES = ["first answer", "second answer"]


def evaluate(reward, **columns):
    return evaluate_reward("mine", reward, PROMPTS, RESPONSES, columns)


def message_of(reward, **columns):
    with pytest.raises(RewardError) as caught:
        evaluate(reward, **columns)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert "mine" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        [0.7, -2],
        (0.7, -2),
        np.array([0.7, -2.0]),
        jnp.array([0.7, -2.0]),
        torch.tensor([0.7, -2.0]),
        [torch.tensor(0.7), jnp.float32(-2)],
        [Decimal("0.7"), np.int8(-2)],
    ],
    ids=["list", "tuple", "numpy", "jax", "torch", "scalars of libraries", "other numbers"],
)
def test_numbers_of_every_library_become_the_same_float32(values):
    scores = evaluate(lambda prompts, responses: values)
    assert scores.dtype == np.float32
    assert scores.tolist() == [np.float32(0.7), -2.0]


def test_booleans_are_zero_and_one():
    assert evaluate(lambda prompts, responses: [True, False]).tolist() == [1.0, 0.0]
    assert evaluate(lambda prompts, responses: np.array([False, True])).tolist() == [0.0, 1.0]


def test_a_bfloat16_array_is_accepted():
    assert evaluate(lambda prompts, responses: jnp.array([0.5, -2], jnp.bfloat16)).tolist() == [0.5, -2.0]


def test_a_reward_gets_the_columns_that_it_names_and_no_others():
    def reward(prompts, responses, target, bonus=1.0):
        return [len(response) - goal + bonus for response, goal in zip(responses, target, strict=True)]

    assert evaluate(reward, target=[10, 11], unused=["x", "y"]).tolist() == [3.0, 3.0]
    assert evaluate(reward, target=[10, 11], bonus=0.5).tolist() == [2.5, 2.5]


def test_a_reward_with_keyword_columns_gets_all_of_them():
    seen = {}
    evaluate(
        lambda prompts, responses, **columns: seen.update(columns) or [0, 0],
        a=[1, 2],
        b=[3, 4],
        prompts=[5, 6],
    )
    assert seen == {"a": [1, 2], "b": [3, 4]}  # a column called like a parameter cannot be passed twice


def test_a_column_that_is_missing_is_named_with_those_there_are():
    message = message_of(lambda prompts, responses, target: [0, 0], facts=[1, 2], other=[1, 2])
    assert message == "reward 'mine' needs the column 'target', which the data lacks; known: facts, other"


def test_an_exception_names_its_type_its_message_and_the_users_line(tmp_path):
    source = "import json\n\n\ndef reward(prompts, responses):\n    return [json.loads(r) for r in responses]\n"
    (tmp_path / "my_rewards_with_a_bug.py").write_text(source)
    sys.path.insert(0, str(tmp_path))
    try:
        from my_rewards_with_a_bug import reward  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    message = message_of(reward)
    assert message.startswith("reward 'mine' raised JSONDecodeError: Expecting value")
    assert message.endswith(f"at {tmp_path / 'my_rewards_with_a_bug.py'}:5")  # not the line inside json


def test_an_exception_with_a_message_of_many_lines_stays_one_line():
    def reward(prompts, responses):
        raise RuntimeError("first\n  second\n" + "long " * 1000)

    assert "RuntimeError: first second long" in message_of(reward)
    assert len(message_of(reward)) < 600


def test_a_reward_that_reads_messages_is_told_that_it_gets_texts():
    message = message_of(lambda completions, **_: [float(c[0]["content"] == "yes") for c in completions])
    assert "(prompts and responses are texts here, not lists of messages)" in message


def test_a_column_that_a_batch_lacks_but_the_data_has_is_none_in_every_row():
    examples = [Example("p", columns={"a": 1}), Example("q")]
    assert column_names([*examples, Example("r", columns={"b": 2})]) == ["a", "b"]
    assert columns_of(examples, ["a", "b"]) == {"a": [1, None], "b": [None, None]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "returned 1 scores; expected one number for each of 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 scores"),
        (np.zeros((2, 1)), "returned an array of shape (2, 1)"),
        (np.float32(1), "returned np.float32(1.0) of type float32"),
        (np.zeros(()), "returned an array of shape ()"),
        (0.5, "returned 0.5 of type float"),
        (None, "returned None;"),
        ("ab", "returned 'ab' of type str"),
        ({"a": 1, "b": 2}, "of type dict"),
        ((x for x in (1, 2)), "of type generator"),
        ([1.0, "2.0"], "gave '2.0' of type str for response 1 'second answer'; expected a number"),
        ([None, 1.0], "gave None for response 0 'first answer'; expected a number"),
        ([[1.0], [2.0]], "gave [1.0] of type list for response 0"),
        ([np.array([1.0]), np.array([2.0])], "of type ndarray for response 0"),
        ([1j, 1.0], "gave 1j of type complex for response 0"),
        (np.array([1j, 1.0]), "gave 1j of type complex for response 0"),
        (np.array(["1", "2"]), "gave '1' of type str for response 0"),
        ([1.0, float("nan")], "gave nan for response 1 'second answer'; a score must be finite"),
        ([float("inf"), 0.0], "gave inf for response 0 'first answer'"),
        (np.array([0.0, -np.inf]), "gave -inf for response 1"),
        ([1e39, 0.0], "gave 1e+39 for response 0 'first answer'; a score must be finite in float32"),
        ([10**400, 0.0], "gave inf for response 0"),
    ],
)
def test_a_wrong_result_is_one_line_that_names_it(values, said):
    assert said in message_of(lambda prompts, responses: values)


def test_a_long_response_is_shortened_in_the_message():
    with pytest.raises(RewardError) as caught:
        evaluate_reward("mine", lambda prompts, responses: [float("nan")], ["p"], ["word\n" * 500])
    assert len(str(caught.value)) < 200
    assert "…" in str(caught.value)


class Starts:
    def __init__(self, finish):
        self.finish = finish

    def start(self, responses):
        return self.finish


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit(), "SystemExit: "),
        (GeneratorExit("gone"), "GeneratorExit: gone"),
        (StopIteration("end"), "StopIteration: end"),
        (asyncio.CancelledError("late"), "CancelledError: late"),
    ],
)
def test_a_reward_that_leaves_has_failed(error, said):
    def leave(responses=None):
        raise error

    def in_a_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(leave).result()

    for reward in (leave, Starts(leave), Starts(in_a_thread)):
        assert message_of(reward).startswith(f"reward 'mine' raised {said}")


def test_an_interrupt_passes_through():
    def reward(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(reward)


def test_columns_of_examples_are_lists_with_none_where_a_row_has_none():
    examples = [Example("p", columns={"a": 1}), Example("q", columns={"b": 2}), Example("r")]
    assert columns_of(examples) == {"a": [1, None, None], "b": [None, 2, None]}
    assert columns_of([]) == {}


def test_a_reward_that_changes_its_columns_changes_no_row_of_the_data_and_no_other_reward():
    example = Example("p", "r", {"refs": ["a"], "facts": {"food": ["thai"]}, "vector": np.zeros(2)})
    columns = columns_of([example, example])  # two answers to one prompt

    def greedy(prompts, responses, refs, facts, vector):
        for row, response in enumerate(responses):
            refs[row].append(response)
            facts[row]["food"].append(response)
            vector[row] += 1
        del responses[0], prompts[0]
        return [float(len(refs[0])), float(len(facts[1]["food"]) + vector[1][0])]

    for _ in range(2):
        assert evaluate(greedy, **columns).tolist() == [2.0, 3.0]
    assert (example.columns["refs"], example.columns["facts"]) == (["a"], {"food": ["thai"]})
    assert example.columns["vector"].tolist() == [0.0, 0.0]
    assert RESPONSES == ["first answer", "second answer"]
