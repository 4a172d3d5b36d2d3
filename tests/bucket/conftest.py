"""A bucket of Google Cloud Storage on the loopback: as much of its JSON API as gcsfs and TensorStore speak.

So the tests run the packages that a TPU VM runs, down to their requests.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from hybrid_jax.runs import files

OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?(?<!/)$")


class Bucket:
    """What lies in the bucket.

    Attributes:
        name: of the one bucket that there is.
        objects: bytes and generation by the name of an object.
        log: method and object of every request.
        refusal: code and reason with which everything is refused, if it is.
        snapshots: what else was there when an object of the name given as key was written.
    """

    def __init__(self, name: str):
        self.name = name
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.log: list[tuple[str, str]] = []
        self.refusal: tuple[int, str] | None = None
        self.snapshots: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.generation = 0
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, bytes]] = {}

    def __getitem__(self, name: str) -> bytes:
        return self.objects[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self.objects

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes) -> dict:
        with self.lock:
            if name in self.snapshots:
                self.snapshots[name] = dict(self.objects)
            self.generation += 1
            self.objects[name] = content, self.generation
        return self.described(name)

    def described(self, name: str) -> dict:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listed(self, prefix: str, delimiter: str) -> dict:
        names, prefixes = [], set()
        for name in self.names(prefix):
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            prefixes.add(prefix + head + delimiter) if found else names.append(name)
        return {
            "kind": "storage#objects",
            "items": [self.described(name) for name in names],
            "prefixes": sorted(prefixes),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet: else every answer waits 40 ms
    bucket: Bucket

    def do_GET(self):
        bucket, name, query = self._parsed()
        if not name:
            listing = self.bucket.listed(query.get("prefix", ""), query.get("delimiter", ""))
            is_list = urlsplit(self.path).path.endswith("/o")
            return self._send(listing if is_list else {"kind": "storage#bucket", "name": bucket})
        if name not in self.bucket:
            return self._refuse(404, f"No such object: {name}")
        content, generation = self.bucket.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(b"", 304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._refuse(412, "conditionNotMet")
        if query.get("alt") != "media":
            return self._send(self.bucket.described(name))
        headers = {"x-goog-generation": str(generation)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            if first >= len(content):
                return self._refuse(416, "out of range")
            part = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            return self._send(part, 206, headers)
        return self._send(content, 200, headers)

    def do_POST(self):
        if self.path.startswith("/batch/"):
            return self._batch()
        _, _, query = self._parsed()
        body = self._body
        kind = query.get("uploadType")
        if "upload_id" in query:
            return self._go_on(query, body)
        if kind == "multipart":
            header = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            about, content = _parts(header, body)
            return self._put(json.loads(about)["name"], content, query)
        if kind == "resumable":
            number = str(len(self.bucket.uploads))
            self.bucket.uploads[number] = query.get("name") or json.loads(body)["name"], b""
            return self._send(
                {}, 200, {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={number}"}
            )
        return self._put(query["name"], body, query)

    def do_PUT(self):
        self._go_on(self._parsed()[2], self._body)

    def _go_on(self, query, body):
        """A chunk of a resumable upload; the last one knows the size of the whole."""
        name, before = self.bucket.uploads[query["upload_id"]]
        content = before + body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self.bucket.uploads[query["upload_id"]] = name, content
            return self._send(b"", 308, {"Range": f"bytes=0-{len(content) - 1}"})
        return self._put(name, content, query)

    def do_DELETE(self):
        _, name, query = self._parsed()
        self._send(*self._delete(name, query.get("ifGenerationMatch")))

    def _delete(self, name: str, generation: str | None = None):
        if name not in self.bucket:
            return _error(404, "notFound"), 404
        if generation not in (None, str(self.bucket.objects[name][1])):
            return _error(412, "conditionNotMet"), 412
        del self.bucket.objects[name]
        return b"", 204

    def _batch(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        names = re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+) HTTP", self._body)
        answers = []
        for name in names:
            _, code = self._delete(unquote(name.decode()))
            self.bucket.log.append(("DELETE", unquote(name.decode())))
            answers.append(f"--b\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code} -\r\n\r\n\r\n")
        text = "".join([*answers, "--b--"]).encode()
        self._send(text, 200, {"Content-Type": "multipart/mixed; boundary=b"})

    def _put(self, name, content, query):
        there = str(self.bucket.objects[name][1]) if name in self.bucket else "0"
        if query.get("ifGenerationMatch", there) != there:
            return self._refuse(412, "conditionNotMet")
        self._send(self.bucket.put(name, content))

    def _parsed(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        found = OBJECT.fullmatch(parts.path)
        assert found, self.path
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        bucket, name = found[1], unquote(found[2] or "")
        self.bucket.log.append((self.command, name or query.get("name") or query.get("prefix", "")))
        if self.bucket.refusal:
            raise _Refused(*self.bucket.refusal)
        if bucket != self.bucket.name:
            raise _Refused(404, "The specified bucket does not exist.")
        return bucket, name, query

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except _Refused as refused:
            self._refuse(*refused.args)
        except ConnectionError:
            self.close_connection = True

    def _refuse(self, code, reason):
        self._send(_error(code, reason), code)

    def _send(self, content, code=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format, *args):
        pass


class _Refused(Exception):
    pass


def _error(code: int, reason: str) -> dict:
    return {"error": {"code": code, "message": reason, "errors": [{"message": reason, "reason": reason}]}}


def _parts(header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The two parts of a multipart/related body, the second to the last byte."""
    boundary = message_from_bytes(header).get_boundary()
    assert boundary
    _, about, rest = re.split(rb"--" + re.escape(boundary.encode()) + rb"\r?\n", body, maxsplit=2)
    split = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]  # noqa: E731
    content = split(rest)
    return split(about), re.sub(rb"\r?\n--" + re.escape(boundary.encode()) + rb"--\s*$", b"", content)


@pytest.fixture(scope="session")
def _served():
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    bucket = Bucket("bucket")
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # TensorStore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google over gRPC what kind of bucket it is
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(_served, tmp_path, monkeypatch):
    """The bucket ``gs://bucket``, empty; its runs are worked on below ``tmp_path``."""
    _served.objects.clear()
    _served.log.clear()
    _served.refusal = None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files._in_bucket.cache_clear()
    yield _served
    files._in_bucket.cache_clear()


@pytest.fixture
def other_machine(tmp_path):
    """Makes the next access that of a machine which has only the bucket."""

    def other():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        files._in_bucket.cache_clear()

    return other
