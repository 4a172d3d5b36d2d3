"""Chat templates rendered within bounds of time, memory and output.

A template is a program that came with a model folder. Those that this package names are rendered here; any
other one in a process of its own (`hybrid_jax.data.template_worker`), which lives as long as this one and is
ended where a conversation takes too long. Both render by jinja in the sandbox of `transformers`.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat_templates import CHAT_TEMPLATES, MOST_LETTERS
from hybrid_jax.data.template_worker import render_job

SECONDS = 5.0  # for one conversation; a template of the hub takes a millisecond
MOST_OUTPUT = 2**26  # bytes of one reply
_START_SECONDS = 120.0  # transformers is imported, on a busy machine
# What `transformers` is called with for every conversation, which no variable may replace.
_RESERVED = {"messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"return_assistant_tokens_mask"}
_OURS = frozenset(template.source for template in CHAT_TEMPLATES.values())

Span = tuple[int, int]  # characters [start, end)


class Part(NamedTuple):
    """The first ``count`` messages of a conversation; ``ask`` writes the header of an answer behind them."""

    count: int
    ask: bool = False


class Job(NamedTuple):
    """One conversation, what its template may name beside the messages, and the parts of it to render."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    parts: Sequence[Part]


class Rendering(NamedTuple):
    """The text of a part, and the spans that the template marks as generated."""

    text: str
    spans: list[Span]


def render_jobs(
    template: str, jobs: Sequence[Job], *, marks: bool = False
) -> list[list[Rendering | UserError]]:
    """The renderings of each job, part by part, in order; an error of the template stands in place of its text.

    Args:
        template: jinja.
        jobs: the conversations.
        marks: asks for the spans.

    Raises:
        UserError: a variable has the name of an argument of rendering, a value is none that JSON has, or a
            conversation takes too much time, memory or output.
    """
    if len(template) > MOST_LETTERS:
        raise UserError(f"the chat template must have at most {MOST_LETTERS:,} letters, got {len(template):,}")
    for job in jobs:
        if taken := _RESERVED & job.variables.keys():
            raise UserError(
                f"a template variable must not be called {min(taken)!r}, which the chat template gets from the "
                "conversation itself; rename or remove it"
            )
    render = _render_here if template in _OURS else _WORKER.render
    return [[_rendering(part) for part in reply] for reply in render(template, jobs, marks)]


def _rendering(reply: Any) -> Rendering | UserError:
    if isinstance(reply, dict):
        return UserError(f"the chat template refuses the messages: {' '.join(reply['error'].split())[:500]}")
    text, spans = reply
    return Rendering(text, [(start, end) for start, end in spans or ()])


def _requested(job: Job) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in job.messages],
        "variables": dict(job.variables),
        "parts": list(job.parts),
    }


def _render_here(template: str, jobs: Sequence[Job], marks: bool) -> list[list[Any]]:
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise UserError(f"chat templates need a package: pip install 'jinja2>=3.1.6' ({error})") from error
    return [render_job(render_jinja_template, template, marks, _requested(job)) for job in jobs]


class _Worker:
    """The other process, started at the first request and again after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, template: str, jobs: Sequence[Job], marks: bool) -> list[list[Any]]:
        """The replies to the jobs, each within its own time."""
        request = {"template": template, "marks": marks, "jobs": [_requested(job) for job in jobs]}
        try:
            data = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the messages must be plain values, such as JSON has: {error}") from error
        with self._lock:
            process = self._started()
            try:
                assert process.stdin is not None
                process.stdin.write(len(data).to_bytes(8, "little") + data)
                process.stdin.flush()
                return [self._reply(process, SECONDS) for _ in jobs]
            except BaseException as error:
                self.close()  # what it still answers must not be taken for answers to another request
                if isinstance(error, TimeoutError):
                    problem = f"takes more than {SECONDS:g} s for one conversation"
                elif isinstance(error, OverflowError):
                    problem = f"writes more than {MOST_OUTPUT >> 20} MiB for one conversation"
                elif isinstance(error, OSError | EOFError):
                    problem = "ends the process that renders it: it takes too much memory, perhaps"
                else:
                    raise
                raise UserError(f"the chat template {problem}; take another template") from error

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # nobody reads what is still to be written
                pass

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hybrid_jax.data.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for us
        )
        try:
            self._reply(self._process, _START_SECONDS)
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            self.close()
            raise UserError(
                "chat templates need packages: pip install transformers 'jinja2>=3.1.6' "
                "(the process that renders them does not start)"
            ) from error
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        length = int.from_bytes(_read(process, 8, deadline), "little")
        if length > MOST_OUTPUT:
            raise OverflowError
        return json.loads(_read(process, length, deadline))


def _read(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    """``size`` bytes of what the process writes, by the deadline."""
    assert process.stdout is not None
    descriptor, found = process.stdout.fileno(), bytearray()
    while len(found) < size:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        part = os.read(descriptor, size - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


_WORKER = _Worker()
