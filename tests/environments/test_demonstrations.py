"""The source of an expert's conversations."""

import statistics

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.environments import catalogue  # noqa: F401  registers the environments
from hybrid_jax.environments.booking import Booking
from hybrid_jax.environments.demonstrations import Demonstrations
from hybrid_jax.environments.twenty_questions import TwentyQuestions


def test_an_experts_conversations_are_chat_rows_that_earn_the_best_return():
    source = Demonstrations(environment=TwentyQuestions(), num_rows=400, num_held_out=5)
    rows = source.load("train")
    assert len(rows) == 400
    roles = [message["role"] for message in rows[0].messages]
    assert roles == ["user", "assistant"] * 4  # what is said after the last answer teaches nothing
    assert rows[0].messages[-1]["content"] == rows[0].response
    assert statistics.mean(row.columns["return"] for row in rows) == pytest.approx(0.85)
    assert rows == source.load("train")
    assert len({row.response for row in rows}) == 8


def test_an_answer_in_so_many_is_the_experts_and_the_others_are_drawn_from_the_moves():
    booking = Booking()
    rows = Demonstrations(environment=booking, num_rows=2000, expert_share=0.75).load("train")
    firsts = [row.messages[1]["content"] for row in rows]
    expected = 0.75 + 0.25 / len(booking.moves())  # which may be the expert's by chance
    assert firsts.count("ask cuisine") / len(rows) == pytest.approx(expected, abs=0.03)
    assert set(firsts) == set(booking.moves())


def test_conversations_of_training_are_none_of_the_held_out_ones_nor_of_another_seed():
    def seeds(seed, split):
        source = Demonstrations(environment=TwentyQuestions(), num_rows=50, num_held_out=20, seed=seed)
        return {int(row.where.split()[-1]) for row in source.load(split)}

    parts = [seeds(seed, split) for seed in (0, 1) for split in ("train", "held_out")]
    assert [len(part) for part in parts] == [50, 20, 50, 20]
    assert len(set.union(*parts)) == 140
    assert min(set.union(*parts)) >= 2**32  # a phase draws 32 bits


def test_a_config_names_the_environment_and_one_without_an_expert_is_one_line():
    given = {"environment": {"name": "booking", "num_slots": 2}, "num_rows": 3}
    source = parse(SOURCES["demonstrations"], given, "data")
    assert [row.messages[0]["content"] for row in source.load("train")] == ["a table please"] * 3
    with pytest.raises(
        ValueError, match="expert_share must be 1 for an environment without moves, which Coy is"
    ):
        Demonstrations(environment=Coy(), expert_share=0.5)
    with pytest.raises(UserError, match="environment Coy has no expert to demonstrate it"):
        Demonstrations(environment=Coy()).load("train")
    with pytest.raises(UserError, match="environment Silent, seed 4294967296: reset returned no message"):
        Demonstrations(environment=Silent()).load("train")


def test_a_filter_keeps_conversations_by_their_return():
    given = {"environment": "twenty_questions", "num_rows": 40, "expert_share": 0.5}
    best = {"name": "one_of", "column": "return", "values": [0.85]}
    returns = [row.columns["return"] for row in parse(SOURCES["demonstrations"], given, "data").load("train")]
    kept = parse(SOURCES["demonstrations"], {**given, "filter": [best]}, "data").load("train")
    assert 0 < len(kept) == returns.count(0.85) < 40


def test_an_expert_may_be_of_the_conversation_itself():
    (row,) = Demonstrations(environment=Coy(expert=lambda: "aha"), num_rows=1).load("train")
    assert [message["content"] for message in row.messages] == ["hello", "aha"]
    assert row.columns["return"] == 0.5


class Coy:
    """Settings and environment in one: a conversation of one turn."""

    def __init__(self, expert=None):
        self.made_with = expert

    def make(self, answer_fn=None):
        live = Coy()
        if self.made_with is not None:
            live.expert = self.made_with
        return live

    def reset(self, seed):
        return [{"role": "user", "content": "hello"}]

    def step(self, text):
        return [], 0.5, True, False, {}


class Silent(TwentyQuestions):
    def make(self, answer_fn=None):
        return self

    def reset(self, seed):
        return []
