"""The process that renders chat templates for `hybrid_jax.data.rendering`, one request after the other.

A request and its reply are JSON behind their length in 8 bytes. A template can ask for any time and memory
(``10 ** 10 ** 10`` is one instruction), which only the end of a process takes back.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

SECONDS = 60  # for one conversation; the parent ends it much earlier, unless it was killed meanwhile
MEMORY = 2**29  # bytes that rendering may take beyond what the process has at its start


def main() -> None:
    """Renders one request after the other, each within its time, until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _send(sys.stdout.buffer, {"ready": True})
    while (request := _receive(sys.stdin.buffer)) is not None:
        signal.alarm(SECONDS)
        try:
            texts, spans = render_jinja_template(**request)
            reply: dict[str, Any] = {"text": texts[0], "spans": spans[0] if spans else None}
        except Exception as error:  # a template may raise anything
            reply = {"error": str(error) or type(error).__name__}
        signal.alarm(0)
        _send(sys.stdout.buffer, reply)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (OSError, ValueError):  # a system without /proc: only time is bounded there
        pass


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(8)
    return json.loads(stream.read(int.from_bytes(head, "little"))) if len(head) == 8 else None


def _send(stream: BinaryIO, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


if __name__ == "__main__":
    main()
