"""A clock of what the host waits for in one step."""

from __future__ import annotations

import time


class Clock:
    """Seconds that the host waited in one step, by part: ``<part>_seconds``."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = self._last = time.perf_counter()

    def restart(self) -> None:
        """Leaves the time since the last lap, of starting the update, to the update."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap, or since the start, as that of ``part``."""
        now = time.perf_counter()
        name = f"{part}_seconds"
        self.seconds[name], self._last = self.seconds.get(name, 0.0) + now - self._last, now
