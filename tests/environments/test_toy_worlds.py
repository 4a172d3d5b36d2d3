"""Toy worlds: what they reply, and their best returns against playing through every policy there is."""

import itertools
import statistics
from collections.abc import Callable

import pytest

from hybrid_jax.environments.booking import Booking
from hybrid_jax.environments.twenty_questions import TwentyQuestions

Policy = Callable[[list], str]  # the messages so far → an answer


def play(settings, seed: int, policy: Policy) -> tuple[float, list]:
    """The return of one conversation, and its messages."""
    world = settings.make()
    messages, total, ended = list(world.reset(seed)), 0.0, False
    while not ended:
        text = policy(messages)
        said, reward, terminated, truncated, _ = world.step(text)
        assert not truncated
        messages += [{"role": "assistant", "content": text}, *said]
        total, ended = total + reward, terminated
    return total, messages


def seeds_of_all(settings, most: int = 2000) -> list[int]:
    """One seed for each secret: what a wrong answer at once is told."""
    seeds = {}
    for seed in range(most):
        world = settings.make()
        world.reset(seed)
        secret = world._secret if isinstance(settings, TwentyQuestions) else tuple(world._wanted.values())
        seeds.setdefault(secret, seed)
    return list(seeds.values())


def best_of_all(settings, moves: list[str]) -> float:
    """The best expected return, by trying every answer at every history with every secret that has led there.

    The world itself tells what happens: each history is played from the start.
    """
    seeds = seeds_of_all(settings)

    def best(history: tuple[str, ...], those: list[int]) -> float:  # summed over the secrets
        values = []
        for move in moves:
            value, going_on = 0.0, {}
            for seed in those:
                world = settings.make()
                world.reset(seed)
                for text in history:
                    world.step(text)
                said, reward, terminated, _, _ = world.step(move)
                value += reward
                if not terminated:
                    going_on.setdefault(said[-1]["content"], []).append(seed)
            values.append(value + sum(best((*history, move), group) for group in going_on.values()))
        return max(values)

    return best((), seeds) / len(seeds)


def best_blind_of_all(settings, moves: list[str], last_moves: list[str], turns: int) -> float:
    """The best expected return of all maps from (number of the turn, last message) to an answer."""
    seeds = seeds_of_all(settings)
    replies = {}  # (seed, history) → the last message, what was earned so far, whether it has ended

    def after(seed, history):
        if (seed, history) not in replies:
            world = settings.make()
            said, total, ended = world.reset(seed), 0.0, False
            for text in history:
                said, reward, ended, _, _ = world.step(text)
                total += reward
            replies[seed, history] = (said[-1]["content"], total, ended)
        return replies[seed, history]

    seen = sorted({after(seed, (move,))[0] for seed in seeds for move in moves if not after(seed, (move,))[2]})
    places = [(turn, text) for turn in range(1, turns) for text in seen]
    best = -1e9
    for first in moves:
        choices = [moves if turn < turns - 1 else last_moves for turn, _ in places]
        for answers in itertools.product(*choices):
            policy, total = dict(zip(places, answers, strict=True)), 0.0
            for seed in seeds:
                history = (first,)
                message, earned, ended = after(seed, history)
                while not ended and len(history) < turns:
                    history = (*history, policy[len(history), message])
                    message, earned, ended = after(seed, history)
                total += earned
            best = max(best, total / len(seeds))
    return best


def test_the_best_returns_of_the_usual_sizes_are_those_of_a_calculation_by_hand():
    game = TwentyQuestions()
    assert game.optimal_return() == pytest.approx(1 - 3 * 0.05)  # 2 ** 3 animals
    assert TwentyQuestions(question_cost=0.6).optimal_return() == pytest.approx(1 / 8)  # guess at once
    assert TwentyQuestions(max_questions=2).optimal_return() == pytest.approx(1 / 2 - 2 * 0.05)
    # Asked in a row, a "yes" is guessed at once: one of 4, of 2, of 1, and the last "no" leaves 1.
    blind = (1 / 2 * 1 / 4 + 1 / 4 * 1 / 2 + 1 / 8 + 1 / 8) - 0.05 * (1 + 1 / 2 + 1 / 4)
    assert game.best_without_history() == pytest.approx(blind)
    talk = Booking()
    assert talk.optimal_return() == pytest.approx(3 - 3 * 0.1)
    assert Booking(max_questions=1).optimal_return() == pytest.approx(1 + 2 / 3 - 0.1)
    assert Booking(question_cost=0.7).optimal_return() == pytest.approx(1)  # a question earns 2 / 3
    assert Booking(max_questions=0).best_without_history() == pytest.approx(1)
    assert talk.optimal_return() * 0.95 > talk.best_without_history() + 0.3


@pytest.mark.parametrize("costs", [{}, {"question_cost": 0.3}, {"wrong": -1.0, "question_cost": 0.4}])
@pytest.mark.parametrize("sizes", [(4, 2, 2), (3, 2, 2), (5, 2, 1), (2, 1, 0)])
def test_the_best_return_of_a_game_is_that_of_every_policy_played(sizes, costs):
    game = TwentyQuestions(*sizes, **costs)
    assert game.optimal_return() == pytest.approx(best_of_all(game, [*game.moves(), "hm"]))


@pytest.mark.parametrize("cost", [0.1, 0.4])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3, 1), (1, 3, 2)])
def test_the_best_return_of_a_booking_is_that_of_every_policy_played(sizes, cost):
    talk = Booking(*sizes, question_cost=cost)
    assert talk.optimal_return() == pytest.approx(best_of_all(talk, [*talk.moves(), "hm"]))


@pytest.mark.parametrize("sizes", [(3, 2, 1), (4, 2, 1), pytest.param((3, 2, 2), marks=pytest.mark.slow)])
def test_the_best_return_without_history_is_that_of_every_such_policy_played(sizes):
    game = TwentyQuestions(*sizes)
    turns = game.max_questions + 1
    assert game.best_without_history() == pytest.approx(
        best_blind_of_all(game, [*game.moves(), "hm"], list(game.animals), turns)
    )


@pytest.mark.parametrize(
    ("sizes", "is_reached"),
    [((1, 3, 1), True), ((2, 2, 1), True), pytest.param((1, 3, 2), True, marks=pytest.mark.slow)],
)
def test_no_policy_without_history_books_better_than_the_bound(sizes, is_reached):
    talk = Booking(*sizes)
    bookings = [move for move in talk.moves() if move.startswith("book")]
    best = best_blind_of_all(talk, [*talk.moves(), "hm"], bookings, talk.max_questions + 1)
    assert best <= talk.best_without_history() + 1e-9
    assert (best == pytest.approx(talk.best_without_history())) == is_reached


def test_the_bound_of_bookings_is_that_of_a_calculation_by_hand():
    """What a user says first is told apart by what follows it: a question for time, for people, or "hm"."""
    after_second = (
        3 + 2 * (1 + 1 + 1 / 3)
    ) / 3  # one time is followed by the third question, the others booked
    after_hm = 1 + 1 + 1 / 3  # the question after it is the last
    free = Booking(question_cost=0.0)
    assert free.best_without_history() == pytest.approx((2 * after_second + after_hm) / 3)


@pytest.mark.parametrize(
    "settings",
    [
        *(TwentyQuestions(), TwentyQuestions(5, 3, 2), TwentyQuestions(wrong=-1.0, max_questions=2)),
        *(Booking(), Booking(max_questions=2), Booking(question_cost=0.7), Booking(2, 6)),
        *(TwentyQuestions(rules=True), Booking(rules=True)),
    ],
)
def test_the_expert_earns_the_best_return_on_average_over_all_secrets(settings):
    returns = [play(settings, seed, settings.expert)[0] for seed in seeds_of_all(settings)]
    assert statistics.mean(returns) == pytest.approx(settings.optimal_return())


def test_what_a_game_replies():
    game = TwentyQuestions()
    seed = next(seed for seed in range(100) if game.make().reset(seed) and secret(game, seed) == "horse")
    world = game.make()
    assert world.reset(seed) == [{"role": "user", "content": "guess"}]
    for text, reply in [("winged?", "no"), (" Is it BIG ?", "yes"), ("it is tame", "what?")]:
        said, reward, terminated, truncated, _ = world.step(text)
        assert (said[0]["content"], reward, terminated, truncated) == (reply, -0.05, False, False)
    assert world.step("is it a horse?")[:3] == ([{"role": "user", "content": "right"}], 1.0, True)
    world.reset(seed)
    assert world.step("bear")[:3] == ([{"role": "user", "content": "wrong, horse"}], 0.0, True)
    world.reset(seed)
    replies = [world.step("tame?") for _ in range(4)]
    assert [reply.messages[0]["content"] for reply in replies] == ["yes", "yes", "yes", "too late, horse"]
    assert [reply.terminated for reply in replies] == [False, False, False, True]
    small = TwentyQuestions(num_animals=2, num_attributes=1).make()
    small.reset(0)
    for text in ("big?", "bear", "eagle cat", "", "e" * 10**6):  # neither in the table
        small.reset(0)
        assert small.step(text).messages[0]["content"] == "what?"


def secret(game, seed):
    world = game.make()
    world.reset(seed)
    return world.step("eagle").messages[0]["content"].removeprefix("wrong, ")


def test_what_a_user_replies_to_a_booking():
    world = Booking().make()
    assert world.reset(1) == [{"role": "user", "content": "a table please"}]
    answers = [world.step(f"ask {slot}").messages[0]["content"] for slot in ("cuisine", "time", "people")]
    wanted = " ".join(answers)
    world.reset(1)
    assert world.step(f"Book {wanted}") == (
        [{"role": "user", "content": "thanks"}],
        3.0,
        True,
        False,
        {"right": 3},
    )
    world.reset(1)
    wrong = next(value for value in ("thai", "greek") if value != answers[0])
    said, reward, *_ = world.step(f"book {answers[2]} {wrong} {answers[1]}")  # in any order
    assert (said[0]["content"], reward) == (f"no, {wanted}", 2.0)
    for text in (
        "book thai 7pm",
        "book thai 7pm 2 4",
        "book thai greek 2",
        "book noon thai 2",
        "ask colour",
        "hi",
    ):
        world.reset(1)
        said, reward, terminated, *_, info = world.step(text)
        assert (said[0]["content"], reward, terminated, info) == ("what?", -0.1, False, {"unclear": 1})
    assert [world.step("ask time")[2] for _ in range(3)] == [False, False, True]  # one was asked before


@pytest.mark.parametrize("settings", [TwentyQuestions(), Booking()])
def test_equal_seeds_give_equal_conversations_and_all_secrets_are_as_likely(settings):
    transcript = [play(settings, seed, settings.expert) for seed in range(20)]
    assert transcript == [play(settings, seed, settings.expert) for seed in range(20)]
    assert len({str(messages) for _, messages in transcript}) > 5
    ends = [play(settings, seed, lambda _: settings.moves()[-1])[1][-1]["content"] for seed in range(4000)]
    shares = [ends.count(end) / len(ends) for end in set(ends)]
    expected = 1 / (8 if isinstance(settings, TwentyQuestions) else 27)
    assert min(shares) > 0.7 * expected
    assert max(shares) < 1.3 * expected
