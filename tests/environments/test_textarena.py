"""TextArena's games, played in processes of their own, against their rules."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.textarena import _WORKER, TextArena

pytest.importorskip("nltk")
if not __import__("importlib.util").util.find_spec("textarena"):  # importing it would disturb this process
    pytest.skip("could not find textarena", allow_module_level=True)

GUESSING = TextArena(id="GuessTheNumber-v0")
HANOI = ("A C", "A B", "C B", "A C", "B A", "B C", "A C")


@pytest.fixture
def play():
    """Makes games that end with the test."""
    games = []

    def begin(settings, seed):
        games.append(settings.make())
        return games[-1], games[-1].reset(seed)[0]["content"]

    yield begin
    for game in games:
        game.close()


def test_bisection_finds_the_number_of_each_seed(play):
    """Twenty numbers need five guesses at most, and each hint halves what is left."""
    numbers = []
    for seed in range(12):
        game, text = play(GUESSING, seed)
        assert "between 1 and 20 within 10 turns" in text
        least, most, rewards = 1, 20, []
        while True:
            numbers_left = least + most
            messages, reward, ended, truncated, info = game.step(str(numbers_left // 2))
            rewards.append(reward)
            assert (truncated, info) == (False, {"invalid_moves": 0})
            if ended:
                break
            hint = re.fullmatch(r"The target number is (higher|lower)\.", messages[0]["content"])
            least, most = (
                (numbers_left // 2 + 1, most) if hint[1] == "higher" else (least, numbers_left // 2 - 1)
            )
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
        assert len(rewards) <= 5
        numbers.append(numbers_left // 2)
    assert len(set(numbers)) > 4


def test_the_tower_of_three_discs_moves_in_seven_steps(play):
    game, _ = play(TextArena(id="TowerOfHanoi-v0"), 0)
    steps = [game.step(f"[{move}]") for move in HANOI]
    assert [step.reward for step in steps] == [0.0] * 6 + [1.0]
    assert [step.terminated for step in steps] == [False] * 6 + [True]
    assert "A: [3, 2]\nB: []\nC: [1]" in steps[0].messages[0]["content"]
    assert "[A C]" not in steps[0].messages[0]["content"]  # what the policy said itself


def test_a_seed_begins_the_same_game_whatever_other_games_do_between(play):
    """Games that draw at every step, with each other's steps in between."""
    settings = TextArena(id="2048-v0")
    moves = ("[up]", "[left]", "[down]", "[right]") * 4

    def run(game):
        return [game.step(move).messages[0]["content"] for move in moves]

    (alone, begun), (first, one), (second, other) = play(settings, 5), play(settings, 5), play(settings, 6)
    assert begun == one != other
    expected = run(alone)
    mixed = [(first.step(m).messages[0]["content"], second.step(m)) for m in moves]
    assert [text for text, _ in mixed] == expected
    assert second.reset(5)[0]["content"] == begun  # a process that has played already
    assert run(second) == expected


def test_the_random_numbers_of_the_program_stay_where_they_are_and_it_imports_nothing(play):
    before = random.getstate(), np.random.get_state()[1].tobytes()
    game, _ = play(GUESSING, 3)
    game.step("7")
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    assert "textarena" not in sys.modules


def test_brackets_are_put_around_an_answer_that_has_none_where_they_are_asked_for(play):
    game, _ = play(GUESSING, 3)
    assert game.step("2").info == {"invalid_moves": 0}
    assert game.step("I say [3] now").info == {"invalid_moves": 0}
    strict, _ = play(TextArena(id="GuessTheNumber-v0", brackets=False), 3)
    first = strict.step("2")
    assert (first.info, first.terminated) == ({"invalid_moves": 1}, False)
    assert first.messages[0]["content"].startswith("You attempted an invalid move.")
    assert strict.step("2").terminated  # the second in a row loses


def test_settings_of_a_game_reach_it(play):
    _, text = play(TextArena(id="GuessTheNumber-v0", arguments={"max_number": 77}), 0)
    assert "between 1 and 77" in text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Chess", "textarena game 'Chess': ValueError: Environment Chess-raw not found in registry"),
        ("KuhnPoker-v0", "'KuhnPoker-v0': AssertionError: The number of players has to be 2, received 1"),
        ("Wordle-v0", "'Wordle-v0': LookupError: .*Resource 'words' not found"),
    ],
)
def test_a_game_that_cannot_be_played_is_one_line(name, problem, play, monkeypatch):
    with pytest.raises(UserError, match=problem) as raised:
        play(TextArena(id=name), 0)
    assert "\n" not in str(raised.value)


def children_of(process):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return {int(pid) for pid in listed.stdout.split()}


def test_a_game_whose_process_is_killed_is_one_line_and_the_others_go_on(play):
    other, _ = play(GUESSING, 0)
    before = children_of(_WORKER._process.pid)
    game, _ = play(GUESSING, 1)
    (pid,) = children_of(_WORKER._process.pid) - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="textarena game 'GuessTheNumber-v0': its process has ended"):
        game.step("3")
    assert other.step("3").messages


def test_no_process_stays_when_a_game_is_closed_or_the_program_killed():
    code = (
        "import os, signal; from hybrid_jax.environments.textarena import TextArena, _WORKER;"
        "games = [TextArena(id='GuessTheNumber-v0').make() for _ in range(3)]; [g.reset(1) for g in games];"
        "games[0].close(); print(_WORKER._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    worker = int(killed.stdout)
    end = time.monotonic() + 20
    while (os.path.exists(f"/proc/{worker}") or children_of(worker)) and time.monotonic() < end:
        time.sleep(0.05)
    running = subprocess.run(["ps", "-eo", "pgid="], capture_output=True, text=True).stdout.split()
    assert str(worker) not in running  # it leads a group of its own, with the games in it
