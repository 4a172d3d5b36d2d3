"""Worlds that need memory: what they say, and that chance is the best there is without it."""

import itertools
import random
import statistics

import pytest

from hybrid_jax.environments.memory import MemoryLength, MemorySize, TMaze

SMALL = [
    (MemoryLength(length=2), 2),
    (MemoryLength(length=1, num_symbols=3), 3),
    (MemoryLength(length=0), 2),
    (MemorySize(size=2, length=0), 8),
    (TMaze(length=1), 2),
    (TMaze(length=2), 2),
]


def play(settings, seed, policy):
    """The return of one conversation, and its messages; ``policy`` answers (number of the turn, messages)."""
    world = settings.make()
    messages, total, ended, turn = list(world.reset(seed)), 0.0, False, 0
    while not ended:
        text = policy(turn, messages)
        said, reward, ended, truncated, _ = world.step(text)
        assert not truncated
        messages += [{"role": "assistant", "content": text}, *said]
        total, turn = total + reward, turn + 1
    return total, messages


def all_worlds(settings, number):
    """One seed of each of the worlds that can be drawn."""
    seeds = {}
    for seed in range(500):
        messages = play(settings, seed, lambda _, messages: settings.expert(messages))[1]
        seeds.setdefault(str([m["content"] for m in messages if m["role"] == "user"]), seed)
    assert len(seeds) == number
    return list(seeds.values())


@pytest.mark.parametrize(("settings", "number"), SMALL)
def test_no_policy_that_sees_the_last_message_and_counts_is_better_than_chance(settings, number):
    seeds, places = all_worlds(settings, number), {}

    def note(turn, messages):
        return places.setdefault((turn, messages[-1]["content"]), settings.expert(messages))

    for seed in seeds:
        play(settings, seed, note)  # as long as a conversation can be
    best = max(
        statistics.mean(play(settings, seed, lambda t, m, of=of: of[t, m[-1]["content"]])[0] for seed in seeds)
        for answers in itertools.product(settings.moves(), repeat=len(places))
        for of in [dict(zip(places, answers, strict=True))]
    )
    assert best == pytest.approx(settings.best_without_history())


@pytest.mark.parametrize(
    "settings", [*(settings for settings, _ in SMALL), MemoryLength(), MemorySize(), TMaze()]
)
def test_the_expert_remembers(settings):
    assert {play(settings, seed, lambda _, m: settings.expert(m))[0] for seed in range(40)} == {1.0}
    assert settings.optimal_return() == 1.0


@pytest.mark.parametrize("settings", [MemoryLength(length=3), MemoryLength(1, num_symbols=4), MemorySize()])
def test_answers_at_random_earn_what_chance_does(settings):
    draw = random.Random(0)
    returns = [play(settings, seed, lambda *_: draw.choice(settings.moves()))[0] for seed in range(2000)]
    assert statistics.mean(returns) == pytest.approx(settings.best_without_history(), abs=0.05)


def said(settings, seed):
    """The texts of a conversation with the expert."""
    return [m["content"] for m in play(settings, seed, lambda _, m: settings.expert(m))[1]]


def test_the_conversations_are_those_of_the_docstring():
    assert said(MemoryLength(length=1), 1) == ["0", "0", "wait", "0", "which?", "0", "right"]
    assert said(TMaze(length=2), 0) == ["right", "on", "hall", "on", "fork", "right", "right"]
    told, _, wait, _, question, answer, reply = said(MemorySize(size=4), 3)
    assert (wait, reply) == ("wait", "right")
    assert told.split()[int(question.strip("?")) - 1] == answer
    assert play(MemoryLength(length=0), 1, lambda *_: " 0\n")[0] == 1.0
    assert play(MemoryLength(length=0), 1, lambda *_: "0 1")[1][-1]["content"] == "wrong, 0"
    assert play(TMaze(), 0, lambda *_: "right")[1][-1]["content"] == "wrong, right"  # before the fork


def test_every_symbol_and_every_question_is_drawn_equally_often():
    told = [MemoryLength(num_symbols=4).make().reset(seed)[0]["content"] for seed in range(2000)]
    assert [told.count(symbol) / 2000 for symbol in "0123"] == pytest.approx([0.25] * 4, abs=0.04)
    worlds = [MemorySize(size=4, length=0).make() for _ in range(2000)]
    bits = [world.reset(seed)[0]["content"].split() for seed, world in enumerate(worlds)]
    asked = [world.step("").messages[0]["content"] for world in worlds]
    assert [asked.count(f"{i}?") / 2000 for i in (1, 2, 3, 4)] == pytest.approx([0.25] * 4, abs=0.04)
    right = [row[int(question[0]) - 1] for row, question in zip(bits, asked, strict=True)]
    assert right.count("1") / 2000 == pytest.approx(0.5, abs=0.04)
