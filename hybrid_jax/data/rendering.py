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
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat_templates import CHAT_TEMPLATES, MOST_LETTERS

SECONDS = 5.0  # for one conversation; a template of the hub takes a millisecond
MOST_OUTPUT = 2**26  # bytes of one reply
_START_SECONDS = 120.0  # transformers is imported, on a busy machine
_OURS = frozenset(template.source for template in CHAT_TEMPLATES.values())

Span = tuple[int, int]  # characters [start, end)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool,
    marks: bool,
    variables: Mapping[str, Any],
) -> tuple[str, list[Span] | None]:
    """The text of a conversation, and the spans that the template marks as generated.

    Args:
        template: jinja.
        messages: of the conversation.
        ask: writes the header of an answer at the end.
        marks: asks for the spans.
        variables: what the template may name beside the messages.

    Raises:
        UserError: the template cannot be read or raises, or takes too much time, memory or output.
    """
    request = {
        "conversations": [[dict(message) for message in messages]],
        "chat_template": template,
        "add_generation_prompt": ask,
        "return_assistant_tokens_mask": marks,
        **variables,
    }
    if len(template) > MOST_LETTERS:
        raise UserError(f"the chat template must have at most {MOST_LETTERS:,} letters, got {len(template):,}")
    reply = _render_here(request) if template in _OURS else _WORKER.render(request)
    if "error" in reply:
        raise UserError(f"the chat template refuses the messages: {' '.join(reply['error'].split())[:500]}")
    spans = reply["spans"]
    return reply["text"], [(start, end) for start, end in spans or ()] if marks else None


def _render_here(request: dict[str, Any]) -> dict[str, Any]:
    try:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(**request)
    except ImportError as error:
        raise UserError(f"chat templates need a package: pip install 'jinja2>=3.1.6' ({error})") from error
    except Exception as error:  # a template may raise anything
        return {"error": str(error) or type(error).__name__}
    return {"text": texts[0], "spans": spans[0] if spans else None}


class _Worker:
    """The other process, started at the first request and again after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
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
                return self._reply(process, SECONDS)
            except BaseException as error:
                self.close()  # its answer to this request must not be taken for that to another
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

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
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
