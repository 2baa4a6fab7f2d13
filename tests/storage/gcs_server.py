"""A bucket of Google Cloud Storage in memory, as far as gcsfs and TensorStore use its JSON API.

Use ``bucket_server()``: both libraries keep the address that they were first given for the whole process.
"""

import base64
import email
import functools
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
# Small, so that listings have several pages.
PAGE = 50


class Bucket:
    """Its objects, and a hook for faults.

    Attributes:
        objects: name to content and generation.
        fault: called with method and object name before a request is served; returns the status to fail with, or None.
        requests: method and object name of every request.
    """

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda method, name: None
        self.uploads: dict[str, tuple[str, bytes]] = {}  # resumable uploads in progress
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        bucket = self

        class Served(Handler):
            served = bucket

        self.url = serve(Served)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that point both libraries here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
        }

    def clear(self) -> None:
        """Removes all objects and the fault."""
        with self.lock:
            self.objects.clear()
            self.requests.clear()
            self.fault = lambda method, name: None

    def put(self, name: str, content: bytes) -> int:
        """Writes an object and returns its generation."""
        with self.lock:
            generation = time.time_ns() // 1000 + next(self.numbers)
            self.objects[name] = content, generation
        return generation

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects that begin so, sorted."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may close connections at any time."""


def serve(handler: type[BaseHTTPRequestHandler]) -> str:
    """Starts a server and returns its address."""
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


@functools.cache
def bucket_server() -> Bucket:
    """The bucket of this process; sets the environment variables."""
    bucket = Bucket()
    os.environ.update(bucket.environment)
    return bucket


class Handler(BaseHTTPRequestHandler):
    """Answers requests about the objects of ``served``."""

    served: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        found = super().handle_expect_100()
        self.wfile.flush()
        return found

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
        if match is None or unquote(match[1]) != BUCKET:
            return self._fail(404, "The specified bucket does not exist.")
        name = unquote(match[2] or query.get("name", ""))
        if url.path.startswith("/upload") and query.get("uploadType") == "multipart":
            name, body = _parts(self.headers["Content-Type"], body)
        with self.served.lock:
            self.served.requests.append((self.command, name))
            status = self.served.fault(self.command, name)
            if status is not None:
                return self._fail(status, "The fault that was asked for.")
            if url.path.startswith("/upload"):
                return self._upload(name, query, body)
            if self.command == "GET" and not name:
                return self._json({"name": BUCKET} if not url.path.endswith("/o") else self._listing(query))
            content, generation = self.served.objects.get(name, (None, 0))
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
                return self._fail(412, "conditionNotMet")
            if content is None:
                return self._fail(404, f"No such object: {BUCKET}/{name}")
            if self.command == "DELETE":
                del self.served.objects[name]
                return self._answer(204, b"")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304, b"")
        if query.get("alt") != "media":
            return self._json(_described(name, content, generation))
        self._send_content(content, generation)

    def _send_content(self, content: bytes, generation: int) -> None:
        headers = {**self._headers(content, generation), "Content-Type": "application/octet-stream"}
        if (wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))) is None:
            return self._answer(200, content, headers)
        size = len(content)
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first > last:
            return self._answer(416, b"", headers)
        self._answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

    def _headers(self, content: bytes, generation: int) -> dict[str, str]:
        return {"x-goog-generation": str(generation)}

    def _upload(self, name: str, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            name, begun = self.served.uploads[query["upload_id"]]
            begun += body
            self.served.uploads[query["upload_id"]] = name, begun
            if len(begun) < int(self.headers["Content-Range"].rpartition("/")[2]):
                return self._answer(308, b"", {"Range": f"bytes=0-{len(begun) - 1}"})
            body = begun
        elif query["uploadType"] == "resumable":
            number = str(next(self.served.numbers))
            self.served.uploads[number] = name, b""
            place = f"{self.served.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={number}"
            return self._answer(200, b"", {"Location": place})
        generation = self.served.objects.get(name, (b"", 0))[1]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return self._fail(412, "conditionNotMet")
        self._json(_described(name, body, self.served.put(name, body)))

    def _listing(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        folders, items = {}, []
        for name in self.served.names(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                items.append(_described(name, *self.served.objects[name]))
        first = int(query.get("pageToken", 0))
        end = first + min(PAGE, int(query.get("maxResults", PAGE)))
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items[first:end]}
        answer |= {"prefixes": list(folders)} if folders and not first else {}
        return answer | ({"nextPageToken": str(end)} if end < len(items) else {})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str) -> None:
        content = json.dumps({"error": {"code": status, "message": message}}).encode()
        self._answer(status, content, {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _parts(kind: str, body: bytes) -> tuple[str, bytes]:
    """Name and content of a multipart upload."""
    boundary = email.message_from_string(f"Content-Type: {kind}\n\n").get_boundary()
    assert boundary is not None
    _, settings, data = body.split(b"--" + boundary.encode(), 2)
    content = data.rpartition(b"\n--" + boundary.encode())[0]
    return json.loads(settings.partition(b"\n\n")[2])["name"], content.partition(b"\n\n")[2]


def _described(name: str, content: bytes, generation: int) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(content)),
        "md5Hash": base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode(),
        "updated": "2026-01-01T00:00:00.000Z",
    }
