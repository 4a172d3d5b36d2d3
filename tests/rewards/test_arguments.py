"""A reward receives its arguments by name; names that could mean anything else are refused before training."""

import functools
import re

import jax
import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.evaluation.evaluate import EvaluationConfig
from hybrid_jax.rewards.arguments import Arguments
from hybrid_jax.rewards.base import RewardError, StartedReward, evaluate_reward
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.shaping import WinRate

PROMPTS, RESPONSES, SOLUTION = ["1+1", "2+2"], ["2", "5"], ["2", "4"]
SEEN = {"prompts": PROMPTS, "responses": RESPONSES, "completions": RESPONSES, "solution": SOLUTION}


def called_with(make):
    """What a reward receives, by the names of its parameters; ``make`` gets a function that notes them."""
    seen = {}
    reward = make(lambda **values: seen.update(values) or [0.0, 0.0])
    evaluate_reward("mine", reward, PROMPTS, RESPONSES, {"solution": SOLUTION})
    return seen


def test_a_reward_written_for_trl_is_scored_as_there():
    def acc(completions, solution, **kw):
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    def swapped(completions, prompts, **kw):
        return [float(c == s) for c, s in zip(completions, kw["solution"], strict=True)]

    for reward in (acc, swapped):
        assert evaluate_reward("acc", reward, PROMPTS, RESPONSES, {"solution": SOLUTION}).tolist() == [1.0, 0.0]


class OfInstances:
    def __init__(self, note):
        self.note = note

    def __call__(self, completions, /, prompts, *, solution):
        return self.note(completions=completions, prompts=prompts, solution=solution)


class Started:
    """Has no ``__call__``."""

    def __init__(self, note):
        self.note = note

    def start(self, completions, prompts):
        return lambda: self.note(completions=completions, prompts=prompts)


def decorated(note):
    def logs(reward):
        @functools.wraps(reward)
        def wrapper(*args, **kwargs):
            return reward(*args, **kwargs)

        return wrapper

    @logs
    def reward(completions, prompts, **kw):
        return note(completions=completions, prompts=prompts, **kw)

    return reward


def with_defaults(note):
    return lambda completions, solution=None, other=3: note(
        completions=completions, solution=solution, other=other
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda n: lambda prompts, responses: n(prompts=prompts, responses=responses), "prompts responses"),
        (lambda n: lambda responses, prompts: n(prompts=prompts, responses=responses), "prompts responses"),
        (lambda note: lambda completions, /: note(completions=completions), "completions"),
        (lambda n: lambda *, solution, responses: n(responses=responses), "responses"),
        (lambda n: lambda completions, **kw: n(completions=completions, **kw), "prompts completions solution"),
        (lambda note: lambda prompts, **kw: note(prompts=prompts, **kw), " ".join(SEEN)),
        (lambda note: lambda **kw: note(**kw), " ".join(SEEN)),
        (OfInstances, "prompts completions solution"),
        (lambda note: OfInstances(note).__call__, "prompts completions solution"),
        (Started, "prompts completions"),
        (decorated, "prompts completions solution"),
        (lambda note: lambda responses, *more: note(responses=responses), "responses"),
    ],
)  # fmt: skip
def test_every_kind_of_callable_receives_what_it_names(make, expected):
    assert called_with(make) == {name: SEEN[name] for name in expected.split()}


def test_a_default_stands_where_there_is_no_column_of_its_name():
    assert called_with(with_defaults) == {"completions": RESPONSES, "solution": SOLUTION, "other": 3}


def test_no_column_replaces_what_partial_has_bound():
    def bound(note):
        def reward(completions, solution, **kw):
            return note(completions=completions, solution=solution, **kw)

        return functools.partial(reward, solution="mine")

    assert called_with(bound) == {"completions": RESPONSES, "solution": "mine", "prompts": PROMPTS}


def test_columns_called_like_anything_of_ours_are_passed_on():
    seen = {}
    columns = {"name": [1, 2], "function": [3, 4], "self": [5, 6], "reward": [7, 8]}
    evaluate_reward("mine", lambda responses, **kw: seen.update(kw) or [0, 0], PROMPTS, RESPONSES, columns)
    assert seen == {"prompts": PROMPTS, **columns}


def test_a_compiled_function_keeps_the_names_of_its_arguments():
    reward = functools.lru_cache(jax.jit(lambda responses, prompts: 0))
    with pytest.raises(RewardError, match="unhashable"):  # it was called, with lists
        evaluate_reward("mine", reward, PROMPTS, RESPONSES)


def unnamed(reward):
    def wrapper(*args, **kwargs):
        return reward(*args, **kwargs)

    return wrapper


MUST = "must take (prompts, responses, **columns) by these names, or completions for responses, got "
REFUSED = [
    (lambda texts, answers: [0, 0], f"{MUST}(texts, answers): its first argument is 'texts'"),
    (lambda solution, completions: [0, 0], f"{MUST}(solution, completions): its first argument is 'solution'"),
    (lambda response: [0, 0], f"{MUST}(response): its first argument is 'response'"),
    (lambda prompts, answer: [0, 0], f"{MUST}(prompts, answer): it does not take the responses"),
    (lambda: [0, 0], f"{MUST}(): it does not take the responses"),
    (lambda *, solution: [0, 0], f"{MUST}(solution): it does not take the responses"),
    (
        unnamed(lambda prompts, responses: [0, 0]),
        f"{MUST}(*args, **kwargs): *args has no names (functools.wraps keeps those of a decorated function)",
    ),
    (len, f"{MUST}(obj): its first argument is 'obj'"),
    (OfInstances, f"{MUST}(note): its first argument is 'note'"),
    (
        max,
        "must take (prompts, responses, **columns), got <built-in function max>, whose arguments have no names "
        "that can be read: call it in a function of your own",
    ),
]


@pytest.mark.parametrize(("reward", "message"), REFUSED)
def test_names_that_could_mean_anything_are_refused_when_the_reward_is_given(reward, message):
    for given in (Part, WinRate):
        with pytest.raises(ValueError, match=f"^reward {re.escape(message)}$"):
            given(reward)
    with pytest.raises(UserError) as in_a_config:
        parse(CompositeReward, {"parts": {"mine": {"reward": reward}}}, "phases.ppo.reward")
    assert str(in_a_config.value) == f"phases.ppo.reward.parts.mine.reward {message}"
    with pytest.raises(ValueError, match=f"^judges.taste: reward {re.escape(message)}$"):
        EvaluationConfig(judges={"taste": reward})
    with pytest.raises(RewardError) as called:
        evaluate_reward("mine", reward, PROMPTS, RESPONSES, {"solution": SOLUTION})
    assert str(called.value) == f"reward 'mine' {message}"


def test_a_reward_on_tokens_must_not_take_one_mask_for_the_other():
    class Swapped:
        def score_tokens(self, tokens, response_mask, attention_mask): ...

    class Renamed:
        def score_tokens(self, ids, mask, response_mask): ...

    with pytest.raises(ValueError, match=r"in this order, got \(tokens, response_mask, attention_mask\)"):
        Part(Swapped())
    assert Part(Renamed()).on_device


def test_a_column_that_no_row_has_is_named_before_anything_is_sampled():
    composite = CompositeReward(
        {"mine": Part(lambda completions, soluton: [0, 0]), "other": Part(Started(None))}
    )
    composite.check_columns(["soluton"])
    with pytest.raises(RewardError) as missing:
        composite.check_columns(["solution"])
    assert str(missing.value) == (
        "reward 'mine' needs the column 'soluton', which the data lacks; did you mean 'solution'? "
        "known: solution"
    )


def test_a_reward_with_start_alone_is_a_reward():
    class Lengths:
        def start(self, prompts, responses):
            return lambda: [len(response) for response in responses]

    assert isinstance(Lengths(), StartedReward)
    assert not callable(Lengths())
    composite = CompositeReward({"mine": Part(Lengths())})
    assert composite.raw(PROMPTS, ["a", "bcd"])["mine"].tolist() == [1.0, 3.0]
    won = evaluate_reward("won", WinRate(Lengths()), PROMPTS, ["a", "bcd"], {"opponents": [["b"], ["cde"]]})
    assert won.tolist() == [0.0, 0.0]
    EvaluationConfig(judges={"lengths": Lengths()})


def test_an_async_reward_is_refused_when_it_is_given():
    async def reward(prompts, responses):
        return [1.0]

    with pytest.raises(ValueError, match="must be a plain function, got one with async"):
        Arguments.of(reward)
