"""A user whom another model plays: what that model reads, and how the conversation ends."""

import pytest

from hybrid_jax.environments.user import User

ROW = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "of the data, which nobody reads"},
]


def test_the_model_reads_the_conversation_with_the_roles_exchanged_behind_its_instruction():
    read, replies = [], iter(["And then?", "Good BYE!"])

    def answer(messages):
        read.append([(m["role"], m["content"]) for m in messages])
        return next(replies)

    user = User(answered_by="other", instruction="Play.").make(answer)
    assert user.reset(0, messages=ROW, prompt="Hi") == ROW[:2]
    messages, reward, terminated, truncated, _ = user.step("Once upon a time")
    assert (messages, reward, terminated, truncated) == (
        [{"role": "user", "content": "And then?"}],
        0.0,
        False,
        False,
    )
    assert user.step("a fox came.").terminated
    told = [("user", "Play."), ("assistant", "Hi"), ("user", "Once upon a time")]
    assert read == [told, [*told, ("assistant", "And then?"), ("user", "a fox came.")]]


@pytest.mark.parametrize(
    ("end", "said", "over"), [(None, "bye", False), ("bye", "goodbye", True), (None, " ", True)]
)
def test_a_user_ends_by_a_word_or_by_saying_nothing(end, said, over):
    user = User(answered_by="other", end=end).make(lambda messages: said)
    assert user.reset(0, prompt="Hi", messages=()) == [{"role": "user", "content": "Hi"}]
    step = user.step("Hello")
    assert step.terminated is over
    assert bool(step.messages) is bool(said.strip())
