"""A server on the loopback whose path says how it misbehaves."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator

DRIP_SECONDS = 8.0  # how long one that drips goes on: beyond what any case may take


def _answer(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no_json": b"<html>hello</html>",
    "a_list": b"[]",
    "no_choices": b"{}",
    "empty_choices": b'{"choices": []}',
    "choices_of_text": b'{"choices": "a"}',
    "no_message": b'{"choices": [{}]}',
    "content_null": _answer(None),
    "content_number": _answer(3),
    "content_prose": _answer("I would say that it is rather kind."),
    "content_wrong_json": _answer('{"verdict": "yes"}'),
    "score_of_text": _answer('{"score": "good"}'),
    "score_of_nan": _answer('{"score": NaN}'),
    "score_of_9": _answer('{"score": 99999}'),
    "deep_json": b'{"choices": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "digits": b'{"choices": ' + b"9" * 5_000 + b"}",
    "latin_1": b'{"choices": [{"message": {"content": "caf\xe9"}}]}',
    "2_megabytes": b" " * 2_000_000,
}


def _head(status: str, *headers: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "Connection: close", "", "")).encode()


def _drip(connection: socket.socket, first: bytes, piece: bytes) -> None:
    connection.sendall(first)
    end = time.monotonic() + DRIP_SECONDS
    while time.monotonic() < end:
        connection.sendall(piece)
        time.sleep(0.2)


def _reply(connection: socket.socket, path: str) -> None:
    if path in BODIES:
        body = BODIES[path]
        connection.sendall(_head("200 OK", f"Content-Length: {len(body)}") + body)
    elif path == "endless":
        connection.sendall(_head("200 OK"))
        end = time.monotonic() + DRIP_SECONDS
        while time.monotonic() < end:
            connection.sendall(b" " * 65_536)
    elif path == "drip_body":
        _drip(connection, _head("200 OK", "Content-Length: 1000"), b" ")
    elif path == "drip_header":
        _drip(connection, b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a")
    elif path == "drip_status":
        _drip(connection, b"HTTP/1.1 200 ", b"O")
    elif path == "continue_forever":
        _drip(connection, b"", b"HTTP/1.1 100 Continue\r\n\r\n")
    elif path == "long_header":
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n")
    elif path == "many_headers":
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-More: a\r\n" * 5_000 + b"\r\n")
    elif path == "closes_in_the_middle":
        connection.sendall(_head("200 OK", "Content-Length: 1000") + b'{"choices"')
    elif path == "says_nothing":
        time.sleep(DRIP_SECONDS)
    elif path == "no_http":
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    elif path == "status_429":
        connection.sendall(_head("429 Too Many Requests", "Retry-After: 86400", "Content-Length: 0"))
    elif path == "status_503_later":
        connection.sendall(
            _head("503 Later", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT", "Content-Length: 0")
        )
    elif path.startswith("status_"):
        body = b"the key sk-secret is wrong"
        connection.sendall(_head(f"{path.removeprefix('status_')} No", f"Content-Length: {len(body)}") + body)
    elif path == "redirect":
        connection.sendall(_head("302 Found", "Location: /v1/redirect/chat/completions", "Content-Length: 0"))
    elif path == "redirect_to_file":
        connection.sendall(_head("302 Found", "Location: file:///etc/passwd", "Content-Length: 0"))
    elif path == "gzip_of_nothing":
        body = gzip.compress(b" " * 50_000_000)
        connection.sendall(_head("200 OK", "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body)
    elif path == "wrong_length":
        connection.sendall(_head("200 OK", "Content-Length: many") + b"{}")
    elif path == "negative_length":
        connection.sendall(_head("200 OK", "Content-Length: -5") + b"{}")
    # "closes_at_once" says nothing at all


def _serve_one(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(DRIP_SECONDS)
        request = b""
        while b"\r\n\r\n" not in request and (piece := connection.recv(65_536)):
            request += piece
        if request:
            _reply(connection, request.split(b" ")[1].decode().strip("/").split("/")[0])


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Its URL, without a path."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve_one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
