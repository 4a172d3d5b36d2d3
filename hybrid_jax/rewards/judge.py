"""Asking a language model behind an OpenAI-compatible endpoint: the only file that speaks HTTP.

It uses the standard library alone, in threads: a judge waits for the network, not for the processor. The key
comes from an environment variable and goes into the request's header, nowhere else: the text of a server's
error is never repeated, since it may quote the key.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import Interval

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Natural, NonNegative, Seconds, Share, settings
from hybrid_jax.core.waiting import result_of
from hybrid_jax.rewards.judge_cache import JudgeCache, Spent
from hybrid_jax.rewards.judge_parsing import BadAnswer, read_reply

log = logging.getLogger(__name__)

MOST_BYTES = 1_000_000  # of a reply
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which another try may succeed
BYTES_PER_TOKEN = 4  # where the endpoint does not count

Messages = list[dict[str, str]]


@settings
class Endpoint:
    """Where the judge is, and how it is asked.

    Attributes:
        url: Of the API, such as ``https://api.openai.com/v1``; ``/chat/completions`` is added.
        model: Its name there.
        api_key_env: The *name* of the environment variable that holds the key; None sends none.
        cache_dir: Folder of the answers and of what they cost.
        concurrency: Questions under way at a time.
        connect_seconds: To wait for a connection.
        read_seconds: For everything after that: TLS, the request and the whole answer.
        retries: Further tries after a failure that may pass.
        backoff_seconds: Before the first retry; doubled each time, with noise, unless the server says how long.
        max_wait_seconds: Of one such pause.
        temperature: Of the judge.
        max_answer_tokens: Of one answer.
        prompt_price: Dollars a million tokens of questions.
        answer_price: Dollars a million tokens of answers.
        max_dollars: No question is sent once so much is spent, over all runs with this ``cache_dir``. Those
            under way still come in: at most ``concurrency`` of them.
        max_total_tokens: The same, in tokens.
        fallback: Value in [0, 1] of a question that stays without a valid answer: logged and counted. None ends
            the run with an error.
    """

    url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    cache_dir: Path = Path("judge_cache")
    concurrency: Annotated[int, Interval(ge=1, le=1024)] = 8
    connect_seconds: Seconds = 10.0
    read_seconds: Seconds = 60.0
    retries: Annotated[int, Interval(ge=0, le=100)] = 4
    backoff_seconds: Annotated[float, Interval(ge=0, le=86400)] = 1.0
    max_wait_seconds: Annotated[float, Interval(ge=0, le=86400)] = 60.0
    temperature: NonNegative = 0.0
    max_answer_tokens: Count = 64
    prompt_price: NonNegative = 0.0
    answer_price: NonNegative = 0.0
    max_dollars: NonNegative | None = None
    max_total_tokens: Natural | None = None
    fallback: Share | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url must hold no user, password or query: the key comes from api_key_env")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            # what was given may be the key itself, so it is not repeated
            raise ValueError("api_key_env must be the name of an environment variable in capitals, not a key")
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme == "http" and self.api_key_env is not None and not here:
            raise ValueError("url must begin with https:// where a key goes to another machine, got http://")
        if self.max_dollars is not None and not (self.prompt_price or self.answer_price):
            raise ValueError("max_dollars needs prompt_price or answer_price, got neither")

    def key(self) -> str | None:
        """The key of the endpoint.

        Raises:
            UserError: The environment does not hold it.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            state = "not a key" if key else "not set"
            raise UserError(
                f"the judge needs its key in the environment variable {self.api_key_env}, which is {state}; "
                "set it, or set api_key_env to null for an endpoint without keys"
            )
        return key


@dataclass(frozen=True)
class Question:
    """One question. ``key`` is the hash of everything that the answer depends on."""

    key: str
    messages: Messages
    read: Callable[[str], float]  # raises BadAnswer


@dataclass
class Judge:
    """Asks one endpoint and counts requests, tokens and cost."""

    endpoint: Endpoint
    counts: dict[str, float] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def start(self, questions: Sequence[Question]) -> Callable[[], list[float]]:
        """Sends the questions; returns what waits for the values in [0, 1].

        Equal questions are asked once, and never again once they are answered.

        Raises:
            UserError: From what is returned: the endpoint refuses, stays unreachable, does not answer in the
                agreed form and there is no fallback, or the ceiling of the cost is reached.
        """
        asking = _Asking(self, self.endpoint.key())
        different = {question.key: question for question in questions}
        answers: dict[str, Future[float]] = {key: Future() for key in different}
        left = deque(different.values())

        def ask() -> None:
            while left and not asking.stop.is_set():
                with contextlib.suppress(IndexError):  # another thread has taken the last one
                    question = left.popleft()
                    _settle(answers[question.key], asking, question)

        for _ in range(min(self.endpoint.concurrency, len(left))):
            threading.Thread(target=ask, name="judge", daemon=True).start()  # which no exit waits for

        def values() -> list[float]:
            try:
                return [result_of(answers[question.key]) for question in questions]
            except BaseException:
                asking.stop.set()
                raise

        return values

    def count(self, **numbers: float) -> None:
        """Adds to the counters; several threads may."""
        with self._lock:
            for name, number in numbers.items():
                self.counts[name] = self.counts.get(name, 0.0) + number

    def take_counts(self) -> dict[str, float]:
        """The counts since the last call: asked, cached, retries, failures, tokens, dollars."""
        with self._lock:
            taken, self.counts = self.counts, {}
        return taken


def _settle(answer: Future[float], asking: _Asking, question: Question) -> None:
    try:
        answer.set_result(asking.value(question))
    except BaseException as error:  # for the thread that waits
        answer.set_exception(error)


class _Passing(Exception):
    """A failure that may pass; ``wait`` is how long the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Asking:
    """One batch of questions under way."""

    def __init__(self, judge: Judge, key: str | None):
        self._judge, self._endpoint, self._key = judge, judge.endpoint, key
        self._cache = JudgeCache(judge.endpoint.cache_dir)
        self.stop = threading.Event()

    def value(self, question: Question) -> float:
        if (known := self._cache.find(question.key)) is not None:
            self._judge.count(cached=1)
            return known
        reason = ""
        for trial in range(self._endpoint.retries + 1):
            self._check_ceiling()
            try:
                value = question.read(self._ask(question.messages))
            except (BadAnswer, _Passing) as error:
                reason = str(error)
                if trial < self._endpoint.retries:
                    self._judge.count(retries=1)
                    self._pause(trial, getattr(error, "wait", None))
            else:
                self._cache.keep(question.key, value)
                return value
        return self._fall_back(reason)

    def _fall_back(self, reason: str) -> float:
        tries, value = self._endpoint.retries + 1, self._endpoint.fallback
        if value is None:
            raise UserError(f"the judge gave no valid answer in {tries} tries: {reason}; set fallback to go on")
        self._judge.count(failures=1)
        log.warning("the judge gave no valid answer in %d tries: %s; fallback %g", tries, reason, value)
        return value

    def _pause(self, trial: int, asked: float | None) -> None:
        own = self._endpoint.backoff_seconds * 2**trial * random.uniform(0.5, 1.0)
        if self.stop.wait(min(own if asked is None else asked, self._endpoint.max_wait_seconds)):
            raise UserError("the judge was stopped")

    def _check_ceiling(self) -> None:
        e = self._endpoint
        if e.max_dollars is None and e.max_total_tokens is None:
            return
        spent = self._cache.spent()
        if e.max_dollars is not None and spent.dollars >= e.max_dollars:
            raise UserError(
                f"the judge has cost ${spent.dollars:.2f}, its ceiling is max_dollars ${e.max_dollars:.2f}; "
                f"raise it, or delete {e.cache_dir} to start anew"
            )
        if e.max_total_tokens is not None and spent.tokens >= e.max_total_tokens:
            raise UserError(
                f"the judge has used {spent.tokens} tokens, its ceiling is max_total_tokens "
                f"{e.max_total_tokens}; raise it, or delete {e.cache_dir} to start anew"
            )

    def _ask(self, messages: Messages) -> str:
        """Asks once and gives the text of the answer, which is paid for even if it cannot be used."""
        e = self._endpoint
        settings = {"model": e.model, "temperature": e.temperature, "max_tokens": e.max_answer_tokens}
        body = json.dumps({**settings, "messages": messages}).encode()
        answer, prompt_tokens, answer_tokens = read_reply(_post(e, self._key, body))
        prompt_tokens = prompt_tokens or len(body) // BYTES_PER_TOKEN
        answer_tokens = answer_tokens or len(answer) // BYTES_PER_TOKEN + 1
        dollars = (prompt_tokens * e.prompt_price + answer_tokens * e.answer_price) / 1e6
        self._cache.pay(Spent(prompt_tokens, answer_tokens, dollars))
        self._judge.count(asked=1, tokens=prompt_tokens + answer_tokens, dollars=dollars)
        return answer


# --------------------------------------------------------------------------------------------------------- HTTP


def _post(endpoint: Endpoint, key: str | None, body: bytes) -> bytes:
    """The body of a reply of status 200. Redirections are not followed: the key is for this host alone."""
    parts = urlsplit(endpoint.url)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    is_secure, host = parts.scheme == "https", parts.hostname or ""
    kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    try:
        line = socket.create_connection((host, parts.port or kind.default_port), endpoint.connect_seconds)
        with contextlib.closing(line), _deadline(line, endpoint.read_seconds):
            connection = kind(host, parts.port)
            connection.sock = _secured(line, host) if is_secure else line
            with contextlib.closing(connection):
                connection.request("POST", parts.path.rstrip("/") + "/chat/completions", body, headers)
                with connection.getresponse() as reply:
                    _check_status(reply, endpoint)
                    return _read(reply)
    except ssl.SSLCertVerificationError:
        raise UserError(f"the certificate of the judge's host {parts.hostname} is not valid") from None
    except (OSError, http.client.HTTPException) as error:  # timeouts and dropped connections are OSErrors
        raise _Passing(f"no reply from {parts.hostname} ({type(error).__name__})") from None


@contextlib.contextmanager
def _deadline(line: socket.socket, seconds: float) -> Iterator[None]:
    """Closes the connection after so many seconds.

    A time-out of each read alone may never end a reply: a server may send a header letter by letter, or answer
    ``100 Continue`` for ever.

    Raises:
        TimeoutError: it did.
    """
    late = threading.Event()
    end = os.dup(line.fileno())  # TLS replaces the socket by its own

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(end)) as same:
            same.shutdown(socket.SHUT_RDWR)

    line.settimeout(seconds)
    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if late.is_set():
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
        timer.join()  # the deadline may be closing it just now
        os.close(end)
    if late.is_set():
        raise TimeoutError


def _secured(line: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(line, server_hostname=host)


def _check_status(reply: http.client.HTTPResponse, endpoint: Endpoint) -> None:
    if reply.status == 200:
        return
    said = f"status {reply.status} {http.client.responses.get(reply.status, '')}".strip()
    if reply.status in PASSING:
        raise _Passing(said, _seconds(reply.getheader("Retry-After")))
    if reply.status in (401, 403):
        source = (
            "no key is sent" if endpoint.api_key_env is None else f"the key is that of {endpoint.api_key_env}"
        )
        raise UserError(f"the judge's endpoint refuses: {said}; {source}")
    raise UserError(
        f"the judge's endpoint refuses: {said}; check url {endpoint.url!r} and model {endpoint.model!r}"
    )


def _read(reply: http.client.HTTPResponse) -> bytes:
    """The whole body, not longer than `MOST_BYTES`."""
    body = reply.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise BadAnswer(f"the reply has more than {MOST_BYTES} bytes")
    if reply.length:  # fewer bytes than the server had promised
        raise http.client.IncompleteRead(b"")
    return body


def _seconds(header: str | None) -> float | None:
    """Retry-After: seconds, or a date."""
    if header is None:
        return None
    if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", header.strip()):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
