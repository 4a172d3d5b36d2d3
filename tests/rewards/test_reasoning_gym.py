"""Tasks of reasoning-gym as data and as a reward: answers of the package, and others made here."""

import re
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.reasoning_gym import ReasoningGym
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.reasoning_gym import ReasoningGymScore

pytest.importorskip("reasoning_gym")
SUMS = ReasoningGym(task="chain_sum", size=60, seed=7, config={"max_terms": 3, "max_digits": 2})


def score(responses, examples, **settings):
    columns = {"reasoning_gym": [example.columns["reasoning_gym"] for example in examples]}
    prompts = [example.prompt for example in examples]
    return evaluate_reward("r", ReasoningGymScore(**settings), prompts, responses, columns).tolist()


def first(task, **settings):
    return ReasoningGym(task=task, size=4, held_out_fraction=0.25, **settings).load("train")[0]


def test_sums_are_right_by_hand_and_the_splits_share_no_question():
    train, held_out = SUMS.load("train"), SUMS.load("held_out")
    for example in (*train, *held_out):
        terms = re.search(r"([-+ \d]+) =", example.prompt)[1]
        assert int(example.response) == sum(
            int(term) for term in re.findall(r"[-+]?\d+", terms.replace(" ", ""))
        )
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert len(train) + len(held_out) == 60
    assert [*train] == [*SUMS.load("train")]
    other = ReasoningGym(task="chain_sum", size=60, seed=8, config={"max_terms": 3, "max_digits": 2})
    shared = {e.prompt for e in (*other.load("train"), *other.load("held_out"))}
    own = {e.prompt for e in (*train, *held_out)}
    assert len(shared & own) >= len(own) - 1  # as the docstring warns


def test_the_template_makes_the_answer_and_the_reward_reads_its_tag():
    tagged = ReasoningGym(
        task="chain_sum", size=20, response_field=None, response_template="So <answer>{answer}</answer>"
    )
    examples = tagged.load("train")
    responses = [example.response for example in examples]
    assert score(responses, examples, tag="answer") == [1.0] * len(examples)
    assert score(["<answer>1</answer> " + r for r in responses], examples, tag="answer") == [1.0] * len(
        examples
    )
    bare = [re.sub("<.*?>", "", response) for response in responses]
    assert score(bare, examples, tag="answer") == [0.0] * len(examples)


def test_a_sum_within_more_text_earns_its_share_of_the_letters():
    examples = SUMS.load("train")[:5]
    answers = [example.response for example in examples]
    assert score(answers, examples) == [1.0] * 5
    assert score([f" {answer}.00\n" for answer in answers], examples) == [1.0] * 5
    texts = [f"It is {answer}" for answer in answers]
    shares = [len(answer) / len(text) for answer, text in zip(answers, texts, strict=True)]
    assert score(texts, examples) == pytest.approx(shares)
    assert score(texts, examples, right_only=True) == [0.0] * 5
    assert score(["", "none", "x", "?", "-"], examples)[:2] == [0.0, 0.0]


@pytest.mark.parametrize("task", ["gcd", "word_sorting", "knights_knaves", "countdown", "number_sorting"])
def test_the_answer_of_the_package_earns_one(task):
    examples = ReasoningGym(task=task, size=20).load("train")
    assert score([example.response for example in examples], examples) == [1.0] * len(examples)


def test_countdown_takes_any_expression_of_its_numbers_and_nothing_else():
    config = {"min_numbers": 2, "max_numbers": 2, "min_target": 1, "max_target": 10_000, "shuffle": False}
    example = first("countdown", config={**config, "min_value": 2, "max_value": 9, "operators": ["*"]})
    a, b = re.fullmatch(r"(\d+)\*(\d+)", example.response.replace(" ", "")).groups()
    answers = [f"{b} * {a}", f"({a})*({b})", f"{a}+{b}+0", f"{a}", "one", "", f"{int(a) * int(b)}"]
    assert score(answers, [example] * 7) == pytest.approx([1.0, 1.0, 0.05, 0.05, 0.0, 0.01, 0.05])


def test_no_answer_runs_and_none_takes_long(tmp_path):
    mark = tmp_path / "ran"
    harm = f"open({str(mark)!r}, 'w')"
    examples = [first(task) for task in ("countdown", "puzzle24", "binary_matrix", "n_queens", "spiral_matrix")]
    examples += [first("string_insertion"), first("bitwise_arithmetic"), first("basic_arithmetic")]
    for answer in (harm, f"[{harm}]", f"__import__('os').system('touch {mark}')"):
        assert score([answer] * len(examples), examples) == [0.0] * len(examples)
    assert not mark.exists()
    began = time.perf_counter()
    assert score(["9**9**9**9", "9* *9**9**9", "9" * 300], examples[:1] * 3) == [0.0, 0.0, 0.0]
    assert score(["[" * 9999, "1" * 10_001], examples[2:3] * 2) == [0.0, 0.0]
    assert time.perf_counter() - began < 5
    for task in ("simple_integration", "polynomial_multiplication", "codeio"):
        with pytest.raises(UserError, match=f"the scorer of '{task}' would run the answers as Python"):
            score(["x"], [first(task)])


def test_a_row_decides_nothing_but_its_question():
    """A forged row has no way to bring an answer, a rule or a program of its own."""
    key = dict(SUMS.load("train")[0].columns["reasoning_gym"])
    reward = ReasoningGymScore()
    for change, problem in (
        ({"answer": "7"}, "must hold task, seed, size, config, index"),
        ({"task": "os:system"}, "reasoning_gym has no task 'os:system'"),
        ({"index": "a"}, "question a of 'chain_sum' cannot be made: TypeError"),
        ({"config": {"min_term": 3}}, "the config of the reasoning_gym task 'chain_sum' is refused: TypeError"),
    ):
        with pytest.raises(UserError, match=problem):
            reward(["?"], ["7"], [{**key, **change}])


def test_a_task_that_is_misspelt_is_one_line():
    with pytest.raises(UserError, match="reasoning_gym has no task 'chainsum'; did you mean 'chain_sum'"):
        ReasoningGym(task="chainsum").load("train")
