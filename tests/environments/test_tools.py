"""Tools: what is a call, what is an error, and what nothing that a model writes can do."""

import math

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.environments.base import ENVIRONMENTS
from hybrid_jax.environments.tools import Calculator, Search, Tools
from hybrid_jax.metrics.retrieval import BM25

ROW = {"prompt": "What is 12 times 12?", "response": "The answer is 144"}


def add_days(day: int, more: int = 1) -> str:
    """Adds days to a day.

    Args:
        day: the day
        more: how many
    """
    return str(day + more)


def conversation(tools=None, **settings):
    world = Tools(tools=tools or {"calculator": Calculator(), "add": add_days}, **settings).make()
    assert world.reset(0, **ROW) == [{"role": "user", "content": ROW["prompt"]}]
    return world


def call(written):
    return f"<tool_call>{written}</tool_call>"


WRONG_TYPE, OPEN = "error: add: day must be of type", "error: a <tool_call> is not closed"
CALLS = [
    (call('{"name": "calculator", "arguments": {"expression": "12 * 12"}}'), ["144"], 0),
    ("calculator(12 * 12)", ["144"], 0),
    (call('{"name": "add", "arguments": {"day": 3, "more": 4}}'), ["7"], 0),
    (call('{"name": "add", "arguments": {"day": 3}}') + call("[]"), ["4", "error"], 1),
    (call('{"name": "add", "arguments": {"day": "3"}}'), [WRONG_TYPE], 1),
    (call('{"name": "add", "arguments": {"day": true}}'), [WRONG_TYPE], 1),
    (call('{"name": "os.system", "arguments": {}}'), ["error: there is no function"], 1),
    ('<tool_call>{"name": "add", "arguments": {"day": 3}}', [OPEN], 1),
    ("<tool_call>" * 40 + "</tool_call>" * 40, [OPEN + ", or there are more"], 1),
    ("calculator(__import__('os'))", ["error: no arithmetic"], 1),
    ("add(3)", ["error: add has 2 arguments"], 1),
]


@pytest.mark.parametrize(("text", "results", "errors"), CALLS, ids=range(len(CALLS)))
def test_a_call_is_answered_and_what_is_none_is_an_error_that_the_policy_reads(text, results, errors):
    step = conversation(error_reward=-0.5).step(text)
    assert [m["role"] for m in step.messages] == ["tool"] * len(results)
    for message, expected in zip(step.messages, results, strict=True):
        assert message["content"].startswith(expected)
    assert (step.reward, step.terminated) == (-0.5 * errors, False)
    assert step.info == {"tool_calls": len(results), "tool_errors": errors}


ANSWERS = [("It is 144.", 1.0), ("144.0", 1.0), ("145", 0.0), ("calculator", 0.0)]


@pytest.mark.parametrize(("text", "right"), ANSWERS)
def test_an_answer_without_a_call_ends_and_earns_by_its_final_number(text, right):
    assert conversation().step(text)[1:] == (right, True, False, {"right": right})


SUMS = [
    ("2 + 3 * 4", "14"),
    ("-(2 - 5) ** 2", "-9"),
    ("1 / 3", "0.3333333333"),
    ("0.1 + 0.2", "0.3"),
    ("2 ** 0.5", None),
    ("1 / 0", None),
    ("0 ** -1", None),
    ("9 ** 9 ** 9", None),
    ("1e99999999", None),
    ("(" * 150 + ")" * 50, None),
    ("9" * 201, None),
    ("2 if 1 else 3", None),
    ("True + 1", None),
    ("[1]", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), SUMS, ids=range(len(SUMS)))
def test_the_calculator_is_exact_and_refuses_everything_that_is_no_arithmetic(text, value):
    if value is None:
        with pytest.raises(ValueError, match=r"arithmetic|division|power|large|letters"):
            Calculator()(text)
    else:
        assert Calculator()(text) == value


def test_the_search_ranks_paragraphs_by_the_formula_of_bm25(tmp_path):
    texts = ["the cat sat", "a dog and a cat and a cow", "dogs bark", "the cow"]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    found = Search(tmp_path / "text.txt", count=2)("a cow, a cat!")
    scores = []
    for text in texts:
        score = 0.0
        for word in ("a", "cow", "cat"):
            f, n = text.split().count(word), sum(word in other.split() for other in texts)
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            score += idf * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(text.split()) / (15 / 4)))
        scores.append(score)
    best = sorted(range(4), key=lambda i: -scores[i])[:2]
    assert found == "\n\n".join(texts[i] for i in best)
    assert Search(tmp_path / "text.txt")("zebra") == "nothing found"
    assert BM25([]).search("a", 3) == []


def test_tools_come_from_a_config_and_their_schemas_are_for_the_template():
    given = {"tools": {"sum": "calculator", "later": f"{__name__}:add_days"}}
    world = parse(Tools, given, "environment", trust=EVERYTHING).make()
    assert [tool["function"]["name"] for tool in world.tools] == ["sum", "later"]
    assert world.tools[1]["function"]["parameters"]["required"] == ["day"]
    assert world.tools[0]["function"]["parameters"]["properties"]["expression"]["type"] == "string"
    with pytest.raises(UserError, match="runs code of its own"):
        parse(Tools, given, "environment")
    assert ENVIRONMENTS["tools"] is Tools
