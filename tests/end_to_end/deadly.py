"""A world that kills the program, once, in the middle of a conversation."""

import os
import signal
import time
from pathlib import Path

import hybrid_jax as hj
from hybrid_jax.environments.twenty_questions import TwentyQuestions


@hj.settings
class Deadly:
    flag: str  # a file: while it is there, the program dies in a second turn

    def make(self, answer_fn=None):
        return Playing(self.flag)


class Playing:
    def __init__(self, flag):
        self.flag, self.game, self.turn = Path(flag), TwentyQuestions().make(), 0

    def reset(self, seed):
        self.pause = seed % 7 / 500
        return self.game.reset(seed)

    def step(self, text):
        self.turn += 1
        time.sleep(self.pause)  # so that the order in which conversations end differs from run to run
        if self.turn == 2 and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.game.step(text)
