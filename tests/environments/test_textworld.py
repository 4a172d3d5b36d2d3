"""TextWorld against games whose solution it knows itself."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.textworld import TextWorld

pytest.importorskip("textworld")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Game .* is not fully supported"
)  # which TextWorld ignores itself


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("games")


def text_of(messages):
    assert [message["role"] for message in messages] == ["user"]
    return messages[0]["content"]


def solve(game, seed):
    """The commands of the walkthrough, what was said to each, and what they earned."""
    said, commands, rewards, ended = [text_of(game.reset(seed))], [], [], False
    while not ended and len(commands) < 20:
        commands.append(game.expert())
        messages, reward, ended, truncated, info = game.step(commands[-1])
        assert not truncated
        said.append(text_of(messages))
        rewards.append(reward)
    return said, commands, rewards, info


def test_the_walkthrough_solves_a_game_with_the_score_that_it_has(cache):
    game = TextWorld(rooms=3, objects=5, quest_length=4, cache=cache).make()
    for seed in range(3):
        said, commands, rewards, info = solve(game, seed)
        assert 2 <= len(commands) <= 4
        assert rewards == [0.0] * (len(commands) - 1) + [1.0]
        assert info == {"won": 1.0}
        assert said[-1].endswith(f"You scored 1 out of a possible 1, in {len(commands) + 1} turns.")
        assert "Possible" not in said[-1]
        assert game.step("look").reward == 0.0  # of a command, not of the game so far
    game.close()


def test_the_walkthrough_of_a_known_game_is_that_of_its_source(cache):
    """The quest in the file of the game, as TextWorld's own generator wrote it."""
    settings = TextWorld(cache=cache)
    game = settings.make()
    _, commands, *_ = solve(game, 7)
    source = json.loads(settings.game_file(7).with_suffix(".json").read_text())
    assert commands == source["metadata"]["walkthrough"]
    game.close()


def test_the_aim_the_room_and_the_possible_commands_are_shown_and_the_banner_is_not(cache):
    game = TextWorld(cache=cache).make()
    first = text_of(game.reset(1))
    lines = first.splitlines()
    assert "$$" not in first
    assert any(line.startswith("-= ") and line.endswith(" =-") for line in lines)
    assert game.expert() in lines[-1].removeprefix("Possible: ").split(", ")
    plain = TextWorld(admissible_commands=False, cache=cache).make()
    assert text_of(plain.reset(1)) == "\n".join(lines[:-1])
    reply = text_of(plain.step("inventory").messages)
    assert reply.startswith("You are carrying")
    assert " =-" not in reply  # the line of the status
    game.close()
    plain.close()


def test_the_seed_chooses_the_game_and_families_share_none(cache):
    settings = TextWorld(num_games=3, cache=cache)
    game = settings.make()
    first = [text_of(game.reset(seed)) for seed in range(4)]
    assert first[3] == first[0]
    assert len(set(first)) == 3
    other = TextWorld(num_games=2, first_game=3, cache=cache)
    assert {other.game_file(seed).name for seed in range(9)} == {"3.z8", "4.z8"}
    assert {settings.game_file(seed).name for seed in range(9)} == {"0.z8", "1.z8", "2.z8"}
    game.close()


def test_a_game_does_not_depend_on_those_that_were_made_before(cache, tmp_path):
    """Its text, from a process of its own."""
    TextWorld(num_games=3, cache=cache).prepare()
    assert sorted(path.name for path in cache.rglob("*-2-4-3-house/*.z8"))[:3] == ["0.z8", "1.z8", "2.z8"]
    code = (
        "import sys; from pathlib import Path; from hybrid_jax.environments.textworld import TextWorld;"
        "TextWorld(num_games=3, cache=Path(sys.argv[1])).game_file(2)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    (alone,) = tmp_path.rglob("2.json")
    (known,) = cache.rglob("*-2-4-3-house/2.json")
    assert alone.read_bytes() == known.read_bytes()


def test_what_is_no_command_of_the_game_reaches_no_interpreter(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    game = TextWorld(cache=cache).make()
    game.reset(0)
    commands = (
        "save",
        "restart",
        "quit",
        "script",
        "undo",
        "tw-extra-infos score",
        "look\nlook",
        "",
        "\0",
        "é",
    )
    for command in (*commands, "x" * 5000, "look. look"):
        messages, reward, terminated, truncated, _ = game.step(command)
        assert text_of(messages).startswith("That's not a verb I recognise.")
        assert (reward, terminated, truncated) == (0.0, False, False)
    assert not list(tmp_path.iterdir())
    assert game.step(f" {game.expert().upper()} \n").messages != messages
    game.close()


def test_the_random_numbers_of_the_program_stay_where_they_are(cache):
    before = random.getstate(), np.random.get_state()[1].tobytes()
    game = TextWorld(num_games=1, first_game=50, cache=cache).make()
    solve(game, 0)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    game.close()


def test_games_on_several_threads_say_what_they_say_alone(cache):
    settings = TextWorld(num_games=4, cache=cache)
    settings.prepare()

    def play(seed):
        game = settings.make()
        played = solve(game, seed)
        game.close()
        return played

    alone = [play(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(play, [*range(4)] * 4)) == alone * 4


def test_a_size_without_games_is_one_line(cache):
    settings = TextWorld(rooms=1, objects=100, cache=cache)
    with pytest.raises(
        UserError, match=r"^the textworld game 0 of 1 rooms, 100 objects and a quest_length of 3 c"
    ):
        settings.game_file(0)
    assert not list(cache.rglob("*-1-100-3-house/*"))
