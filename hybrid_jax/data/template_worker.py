"""The process that renders chat templates for `hybrid_jax.data.rendering`, one request after the other.

A request holds many conversations that share a template, and its reply comes conversation by conversation; each
is JSON behind its length in 8 bytes. A template can ask for any time and memory (``10 ** 10 ** 10`` is one
instruction), which only the end of a process takes back.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

SECONDS = 60  # for one conversation; the parent ends it much earlier, unless it was killed meanwhile
MEMORY = 2**29  # bytes that rendering may take beyond what the process has at its start


def main() -> None:
    """Renders one conversation after the other, each within its time, until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _send(sys.stdout.buffer, {"ready": True})
    while (request := _receive(sys.stdin.buffer)) is not None:
        for job in request["jobs"]:
            signal.alarm(SECONDS)
            reply = render_job(render_jinja_template, request["template"], request["marks"], job)
            signal.alarm(0)
            _send(sys.stdout.buffer, reply)


def render_job(render: Callable[..., Any], template: str, marks: bool, job: dict[str, Any]) -> list[Any]:
    """Renders what is asked of one conversation: a text with its marked spans each, or an error.

    Args:
        render: the function of `transformers`.
        template: jinja.
        marks: asks for the spans that the template marks as generated.
        job: the messages, the variables, and how many messages to render, with or without a question behind.
    """
    replies: list[Any] = []
    for count, ask in job["parts"]:
        try:
            texts, spans = render(
                **job["variables"],
                conversations=[job["messages"][:count]],
                chat_template=template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marks,
            )
            replies.append([texts[0], spans[0] if spans else None])
        except Exception as error:  # a template may raise anything
            replies.append({"error": str(error) or type(error).__name__})
    return replies


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):  # a system without /proc: only time is bounded there
        pass


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(8)
    return json.loads(stream.read(int.from_bytes(head, "little"))) if len(head) == 8 else None


def _send(stream: BinaryIO, content: Any) -> None:
    data = json.dumps(content).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


if __name__ == "__main__":
    main()
