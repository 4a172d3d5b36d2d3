"""Turns of a peer of `bench.py`: each line of stdin is a number of steps, the answer their seconds.

It imports nothing but the standard library: peers run in environments of their own.
"""

import json
import os
import sys
import time


class Turns:
    """Stdout belongs to the answers; whatever else the process prints goes to stderr."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def begin(self, **versions):
        """Says what takes part, and waits for the first turn."""
        self._answer(versions)
        self._wait()

    def step_ended(self):
        """To be called after each step; at the end of a turn it returns when the next one begins."""
        self._seconds.append(time.perf_counter() - self._started)
        if len(self._seconds) == self._steps:
            self._answer(self._seconds)
            self._wait()
        self._started = time.perf_counter()

    def _wait(self):
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._steps, self._seconds, self._started = int(line), [], time.perf_counter()

    def _answer(self, value):
        print(json.dumps(value), file=self._answers, flush=True)
