"""TextArena: single-player text games (Guertler et al. 2025), each in a process of its own.

A game seeds and reads the global `random` of its process. One process per program holds the package and forks a
small one for every game (`textarena_worker`), so that neither the program nor another game loses its numbers.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step


@ENVIRONMENTS.register("textarena")
@settings
class TextArena:
    """A single-player game of TextArena; its reward comes at its end.

    Nothing is downloaded: a game that needs word lists finds those of nltk on this machine, or fails.

    Attributes:
        id: of the game, such as ``GuessTheNumber-v0``, without ``-train`` and ``-raw``.
        brackets: puts an answer without any into the square brackets that most games look for.
        arguments: of the game, by name, such as ``{max_number: 50}``.
    """

    id: str
    brackets: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, answer_fn: AnswerFn | None = None) -> TextArenaGame:
        """An environment that plays the game."""
        return TextArenaGame(self)


class TextArenaGame:
    """A game under way, in a process of its own."""

    def __init__(self, settings: TextArena):
        self._settings = settings
        self._connection: socket.socket | None = None

    def reset(self, seed: int, **row: Any) -> list[dict[str, str]]:
        """Begins the game of a seed."""
        if self._connection is None:
            self._connection = _WORKER.new_game()
            self._lines = self._connection.makefile("rw", encoding="utf-8")
        asked = {"id": self._settings.id, "arguments": dict(self._settings.arguments), "seed": seed}
        return [{"role": "user", "content": self._ask(asked)["text"]}]

    def step(self, text: str) -> Step:
        """Gives an answer to the game."""
        if self._settings.brackets and not {"[", "]"} & {*text}:
            text = f"[{text.strip()}]"
        reply = self._ask({"answer": text})
        messages = [{"role": "user", "content": reply["text"]}]
        return Step(messages, reply["reward"], reply["ended"], False, {"invalid_moves": reply["invalid"]})

    def close(self) -> None:
        """Ends the process of the game."""
        if self._connection is not None:
            self._lines.close()
            self._connection.close()
            self._connection = None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._lines.write(json.dumps(request) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        except OSError:
            line = ""
        reply = json.loads(line) if line else {"error": "its process has ended"}
        if "error" in reply:
            raise UserError(f"textarena game {self._settings.id!r}: {reply['error']}")
        return reply


class _Worker:
    """The process that forks those of the games, started with the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def new_game(self) -> socket.socket:
        """Starts the process of a game; gives the connection with it, whose end ends it."""
        ours, its = socket.socketpair()
        with self._lock, its:
            if self._process is None or self._process.poll() is not None:
                self._start()
            socket.send_fds(self._control, [b"g"], [its.fileno()])
        return ours

    def close(self) -> None:
        """Ends it; it ends by itself, too, where this process is killed."""
        if self._process is not None:
            self._control.close()
            self._process.wait()

    def _start(self) -> None:
        self._control, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybrid_jax.environments.textarena_worker", str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for us
            )


_WORKER = _Worker()
