"""TextWorld: text games that are made to measure, with a known shortest solution (Côté et al. 2018).

The policy reads the aim and its room, and answers with a command such as ``take key from box``, alone and
nothing else. What is no command of the game, or not possible now, changes nothing.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.core.writing import user_cache
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.environments.factories import package_of

log = logging.getLogger(__name__)

_LOCK = threading.Lock()  # the parsers of TextWorld are not made for several threads
_NOTHING = "That's not a verb I recognise."
_STATUS = re.compile(r"\n>?\s*-= [^\n]* =-\d+/\d+\s*$|Would you like to RESTART,.*", re.DOTALL)


@ENVIRONMENTS.register("textworld")
@settings
class TextWorld:
    """A family of TextWorld games of one size; the seed of a conversation chooses the game.

    The reward of a command is the change of the score. The games end with the aim reached. They are made when
    they are first played, about a second each, and kept.

    Attributes:
        rooms: of a game.
        objects: of a game, at least; a quest may need more.
        quest_length: commands of the quest; a game may have a shorter solution.
        theme: of names and descriptions; ``basic`` has the plainest.
        num_games: of the family.
        first_game: number of the family's first game. Families of one size share a game exactly where their
            numbers overlap: train on 0–99, test on 100–149.
        admissible_commands: lists the possible commands after each description.
        cache: folder of the games; None is one among the caches of the user.
    """

    rooms: Annotated[int, Interval(ge=1, le=20)] = 2
    objects: Annotated[int, Interval(ge=1, le=100)] = 4
    quest_length: Annotated[int, Interval(ge=1, le=50)] = 3
    theme: Literal["house", "basic"] = "house"
    num_games: Count = 100
    first_game: Annotated[int, Interval(ge=0, le=2**30)] = 0
    admissible_commands: bool = True
    cache: Path | None = None

    def make(self, answer_fn: AnswerFn | None = None) -> TextWorldGame:
        """An environment that plays the games of the family."""
        return TextWorldGame(self)

    def prepare(self) -> None:
        """Makes the games of the family that are missing."""
        missing = [number for number in range(self.num_games) if not self._path(number).is_file()]
        if missing:
            log.info("making %d TextWorld games, some seconds each, in %s", len(missing), self._path(0).parent)
        for number in missing:
            self.game_file(number)

    def game_file(self, seed: int) -> Path:
        """The compiled game of a seed; made where it is missing.

        Raises:
            UserError: there is no game of such a size.
        """
        path = self._path(seed)
        with _LOCK:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as beside:
                    self._compile(int(path.stem), Path(beside) / path.name)
                    for made in (path.with_suffix(".json"), path):  # the game last: it says that all is there
                        os.replace(Path(beside) / made.name, made)
        return path

    def _path(self, seed: int) -> Path:
        version = package_of("textworld", "textworld").__version__
        size = f"{version}-{self.rooms}-{self.objects}-{self.quest_length}-{self.theme}"
        return (
            (self.cache or user_cache() / "textworld") / size / f"{self.first_game + seed % self.num_games}.z8"
        )

    def _compile(self, number: int, path: Path) -> None:
        textworld = package_of("textworld", "textworld")
        options = textworld.GameOptions()
        options.kb = textworld.generator.KnowledgeBase.default()
        options.nb_rooms, options.nb_objects = self.rooms, self.objects
        options.quest_length, options.grammar.theme = self.quest_length, self.theme
        options.seeds, options.path = number, str(path)
        try:
            textworld.make(options)
        except Exception as error:  # of the search for a quest, or of the compiler
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            size = f"{self.rooms} rooms, {self.objects} objects and a quest_length of {self.quest_length}"
            raise UserError(f"the textworld game {number} of {size} cannot be made: {reason}") from error


class TextWorldGame:
    """A game under way."""

    def __init__(self, settings: TextWorld):
        self._settings = settings
        self._game: Any = None

    def reset(self, seed: int, **row: Any) -> list[dict[str, str]]:
        """Begins the game of a seed."""
        textworld, path = package_of("textworld", "textworld"), self._settings.game_file(seed)
        names = ("feedback", "description", "objective", "verbs", "admissible_commands", "policy_commands")
        infos = textworld.EnvInfos(**dict.fromkeys((*names, "score", "max_score", "won", "lost"), True))
        self.close()
        with _LOCK:
            self._game = textworld.start(str(path), infos)
            self._state = self._game.reset()
        return self._said(f"{self._state.objective}\n{self._state.description}")

    def step(self, text: str) -> Step:
        """Gives a command to the game."""
        command, before = text.strip().lower(), self._state.score
        verbs = {verb.split()[0] for verb in self._state.verbs}
        if re.fullmatch("[a-z0-9 '-]{1,100}", command) and command.split()[0] in verbs:
            self._state, _, ended = self._game.step(command)
            reply = self._state.feedback
        else:  # others would save files, begin anew or stop the interpreter
            reply, ended = _NOTHING, False
        won = {"won": float(ended and self._state.won)}
        return Step(self._said(reply, ended), float(self._state.score - before), ended, False, won)

    def expert(self) -> str:
        """The next command of a shortest solution from here; ``look`` where there is none."""
        return next(iter(self._state.policy_commands), "look")

    def close(self) -> None:
        """Ends the game."""
        if self._game is not None:
            self._game.close()

    def _said(self, text: str, ended: bool = False) -> list[dict[str, str]]:
        text = re.sub(r"\s*\n\s*", "\n", _STATUS.sub("", text)).strip()
        if self._settings.admissible_commands and not ended:
            text += f"\nPossible: {', '.join(self._state.admissible_commands)}"
        return [{"role": "user", "content": text}]
