"""A server on the loopback that speaks the hub's protocol, and can be told to misbehave."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"


class Hub:
    """Repositories by name, each with files; large files are redirected to a second path, as to a CDN.

    ``fault`` is what happens to the next downloads: ``drop`` (the connection ends after half of what was asked
    for, once), ``short`` (half of it, as if it were all), ``page`` (HTML with status 200), ``damage`` (one byte
    differs), ``no_range`` (the whole file whatever was asked for). ``foreign`` answers everything with HTML.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], large: int = 1000):
        self.repositories, self.large = repositories, large
        self.fault, self.foreign, self.url, self.cdn = "", False, "", ""
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range)
        self.authorized: list[tuple[str, str | None]] = []  # (path, Authorization)

    def downloads(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file's bytes."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(name)]


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs the server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")  # another host's name: tokens must not go there
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _sha1(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.respond()

        def do_GET(self):
            self.respond()

        def do_POST(self):
            """An upload: a repository, how files are to be sent (in the commit), and the commit."""
            length, path = int(self.headers.get("Content-Length", 0)), unquote(urlsplit(self.path).path)
            body = self.rfile.read(length)
            hub.requests.append((self.command, path, None))
            hub.authorized.append((path, self.headers.get("Authorization")))
            match path.strip("/").split("/"):
                case "api", "repos", "create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.repositories.setdefault(name, {})
                    return self.said({"url": f"{hub.url}/{name}", "id": name})
                case "api", "validate-yaml":
                    return self.said({"errors": [], "warnings": []})
                case "api", "models", _, _, "preupload", _:
                    files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                    return self.said({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
                case "api", "models", owner, name, "commit", _:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            content = base64.b64decode(line["value"]["content"])
                            hub.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
                    url = f"{hub.url}/{owner}/{name}/commit/{COMMIT}"
                    return self.said({"success": True, "commitUrl": url, "commitOid": COMMIT})
            return self.missing("EntryNotFound")

        def said(self, values):
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(values).encode())

        def respond(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            hub.authorized.append((path, self.headers.get("Authorization")))
            if hub.foreign:
                return self.answer(200, {"Content-Type": "text/html"}, PAGE)
            match path.strip("/").split("/"):
                case "api", "models", owner, name, "tree", *_:
                    files = hub.repositories[f"{owner}/{name}"]
                    listed = [
                        {"type": "file", "path": file, "size": len(content), "oid": _sha1(content)}
                        for file, content in files.items()
                    ]
                    return self.said(listed)
                case "api", "models", owner, name, *_:
                    files = hub.repositories.get(f"{owner}/{name}")
                    if files is None:
                        return self.missing("RepoNotFound")
                    siblings = [{"rfilename": file} for file in files]
                    body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode()
                    return self.answer(200, {"Content-Type": "application/json"}, body)
                case "cdn", owner, name, *rest:
                    return self.content(hub.repositories[f"{owner}/{name}"]["/".join(rest)])
                case owner, name, "resolve", revision, *rest:
                    files, file = hub.repositories.get(f"{owner}/{name}"), "/".join(rest)
                    if files is None:
                        return self.missing("RepoNotFound")
                    if revision not in ("main", "float16", COMMIT):
                        return self.missing("RevisionNotFound")
                    if file not in files:
                        return self.missing("EntryNotFound")
                    content = files[file]
                    if len(content) < hub.large:
                        return self.content(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_sha1(content)}"'})
                    linked = {
                        "X-Repo-Commit": COMMIT,
                        "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                        "X-Linked-Size": str(len(content)),
                        "Location": f"{hub.cdn}/cdn/{owner}/{name}/{file}",
                    }
                    return self.answer(302, linked, b"")
            return self.missing("EntryNotFound")

        def missing(self, code):
            self.answer(404, {"X-Error-Code": code}, b"")

        def content(self, content, headers=None):
            headers, status, start = dict(headers or {}), 200, 0
            if hub.fault == "page":
                content = PAGE
            if hub.fault == "damage":
                content = content[:-1] + bytes([content[-1] ^ 1])
            asked = self.headers.get("Range")
            if asked and hub.fault != "no_range":
                start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            if self.command == "GET" and hub.fault == "short":
                body = body[: len(body) // 2]
            if self.command == "GET" and hub.fault == "drop":
                hub.fault = ""
                self.close_connection = True
                return self.answer(status, headers, body[: len(body) // 2], length=len(body))
            return self.answer(status, headers, body)

        def answer(self, status, headers, body, length=None):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command in ("GET", "POST"):
                self.wfile.write(body)

    return Handler
