"""A class for TRL's ``environment_factory`` over messages; TRL itself finds the same tools in it."""

import json

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.environments.trl import TRL


class Counter:
    """A counter that is to reach a number."""

    def reset(self, target=3, **row) -> str | None:
        self.count, self.target = 0, target
        return f" Reach {target}." if target > 3 else None

    def add(self, amount: int, times: int = 1) -> int:
        """
        Adds to the counter.

        Args:
            amount: What to add.
            times: How often.

        Returns:
            The counter.
        """
        if amount > 100:
            raise ValueError("too much")
        self.count += amount * times
        return self.count

    def _hidden(self):
        raise AssertionError

    def get_reward(self) -> float:
        return 1.0 if self.count == self.target else -0.5


class Silent:
    def reset(self, **row):
        return None


class Untyped(Silent):
    def act(self, x):
        """Acts."""


class Asynchronous(Silent):
    async def act(self):
        """Acts."""


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_change_the_world_and_the_last_answer_is_paid():
    game = TRL(factory=Counter).make()
    assert game.reset(0, prompt="Count.", target=7) == [{"role": "user", "content": "Count. Reach 7."}]
    first = game.step("Let me see. " + call("add", amount=2) + call("add", amount=2, times=2))
    assert first.messages == [{"role": "tool", "name": "add", "content": str(n)} for n in (2, 6)]
    assert first[1:] == (0.0, False, False, {"tool_calls": 2, "tool_errors": 0})
    game.step(call("add", amount=1))
    assert game.step("Done: add 1.") == ([], 1.0, True, False, {"tool_calls": 0, "tool_errors": 0})
    assert game.reset(0, prompt="Again.") == [{"role": "user", "content": "Again."}]
    assert game.step("Nothing.").reward == -0.5
    without = TRL(factory=Silent).make()
    without.reset(0, prompt="Hi")
    assert without.step("Hi").reward == 0.0


def test_the_messages_of_a_row_are_kept_and_not_changed():
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Count."}]
    game = TRL(factory=Counter, prompt_column="question").make()
    asked = game.reset(0, question=messages, target=9)
    assert asked == [messages[0], {"role": "user", "content": "Count. Reach 9."}]
    assert messages[1]["content"] == "Count."


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("<tool_call>add(1)</tool_call>", "a call must be JSON"),
        ('<tool_call>{"name": "add"}</tool_call>', 'a call must be {"name": …, "arguments": {…}}'),
        ("<tool_call>[1]</tool_call>", 'a call must be {"name": …, "arguments": {…}}'),
        (call("sub", amount=1), "there is no function 'sub'; known: add"),
        (call("_hidden"), "there is no function '_hidden'; known: add"),
        (call("get_reward"), "there is no function 'get_reward'; known: add"),
        (call("reset"), "there is no function 'reset'; known: add"),
        (call("add"), "add lacks the argument 'amount'"),
        (call("add", amount="1"), 'add: amount must be of type integer, got "1"'),
        (call("add", amount=True), "add: amount must be of type integer, got true"),
        (call("add", amount=1.5), "add: amount must be of type integer, got 1.5"),
        (call("add", amount=1, self=2), "add has no argument 'self'; known: amount, times"),
        (call("add", amount=101), "too much"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "a call must be JSON"),
    ],
)
def test_a_call_that_is_wrong_is_an_error_that_the_policy_reads(answer, error):
    game = TRL(factory=Counter).make()
    game.reset(0, prompt="Count.")
    (message,), reward, terminated, _, info = game.step(answer)
    assert message["role"] == "tool"
    assert message["content"].startswith(f"error: {error}")
    assert (reward, terminated, info) == (0.0, False, {"tool_calls": 1, "tool_errors": 1})
    assert game._environment.count == 0


def test_the_tools_are_those_that_trl_shows():
    from transformers.utils import get_json_schema

    (tool,) = TRL(factory=Counter).make().tools
    assert tool == get_json_schema(Counter().add)
    assert tool["function"]["parameters"]["required"] == ["amount"]


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (Untyped, "the tool 'act' needs types and a docstring"),
        (Asynchronous, "the tool 'act' must not be async"),
    ],
)
def test_tools_without_types_or_with_async_are_one_line(factory, problem):
    with pytest.raises(UserError, match=problem):
        TRL(factory=factory).make()


def test_only_a_trusted_config_names_a_class():
    with pytest.raises(Untrusted, match="'my_module:MyEnv' runs code of its own"):
        parse(TRL, {"factory": "my_module:MyEnv"}, "environment")
    with pytest.raises(UserError, match="a row has no column 'prompt'; it has question"):
        TRL(factory=Silent).make().reset(0, question="?")
