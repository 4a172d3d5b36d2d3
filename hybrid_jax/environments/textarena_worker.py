"""The process that plays games of TextArena for `hybrid_jax.environments.textarena`.

It imports the package once and forks for every game, which costs milliseconds. Each game reads requests and
writes replies over a connection of its own, one JSON object a line, until the connection ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.factories import package_of

SECONDS = 600  # for one request; the parent gives up much earlier, and this ends what hangs


def main() -> None:
    """Forks a process for every connection that arrives, until no more can."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the games
    problem = None
    try:
        package_of("textarena", "textarena")
        package_of("textarena", "nltk").download = lambda *_, **__: False  # several games ask for it
    except UserError as error:
        problem = str(error)
    while True:
        _, connections, _, _ = socket.recv_fds(control, 1, 1)
        if not connections:
            return
        if os.fork() == 0:
            control.close()
            with socket.socket(fileno=connections[0]) as connection:
                serve(connection, problem)
            os._exit(0)
        os.close(connections[0])


def serve(connection: socket.socket, problem: str | None) -> None:
    """Answers the requests of one game; every one by ``problem``, where there is one."""
    game: Any = None
    with connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            signal.alarm(SECONDS)
            request = json.loads(line)
            try:
                if problem is not None:
                    reply = {"error": problem}
                elif "answer" in request:
                    reply = play(game, request["answer"])
                else:
                    game = begin(request["id"], request["arguments"], request["seed"])
                    reply = {"text": text_of(game)}
            except Exception as error:  # of the game
                reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            signal.alarm(0)
            lines.write(json.dumps(reply) + "\n")
            lines.flush()


def begin(identity: str, arguments: dict[str, Any], seed: int) -> Any:
    """Makes a game, with new messages alone as its observations."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    game = package_of("textarena", "textarena").make(f"{identity}-raw", **arguments)
    game.reset(num_players=1, seed=seed)
    return game


def play(game: Any, answer: str) -> dict[str, Any]:
    """Gives an answer to a game."""
    ended, _ = game.step(action=answer)
    state = game.state
    text, reward = text_of(game), 0.0
    if ended:
        rewards, infos = game.close()
        text, reward = f"{text}\n{infos[0].get('reason') or ''}".strip(), float(rewards[0])
    invalid = state.game_info[0]["invalid_move"] or getattr(state, "error_count", 0) > 0
    return {"text": text, "reward": reward, "ended": bool(ended), "invalid": int(invalid)}


def text_of(game: Any) -> str:
    """The messages of a game that the player has not read, without its own."""
    _, messages = game.get_observation()
    return "\n".join(text.strip() for _, text, kind in messages if kind.name != "PLAYER_ACTION")


if __name__ == "__main__":
    main()
