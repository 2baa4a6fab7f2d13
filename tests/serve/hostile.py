"""Requests of somebody who means harm: a table of what is sent, and what must come back.

Each row is a test (``test_hostile.py``); ``benchmarks/hostile_inputs.py`` sends them all to a server of a real
checkpoint and prints how long each took.
"""

import base64
import contextlib
import http.client
import json
import select
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.prompts.fetch import FetchRules
from magma_jax.serve.prompts.images import ImageRules
from tests.data.hostile_images import SLOW, bmp_runs, chunk, many_scans, saved
from tests.hostile_schemas import SCHEMAS

CHAT = "/v1/chat/completions"
# An address that may be connected to; the connection then goes to the host of the tests.
OUTSIDE = "93.184.215.14"
INSIDE = {
    "private 10/8": "10.0.0.1",
    "private 172.16/12": "172.31.255.254",
    "private 192.168/16": "192.168.1.1",
    "loopback": "127.0.0.1",
    "loopback, another": "127.9.9.9",
    "loopback v6": "::1",
    "this host": "0.0.0.0",
    "unspecified v6": "::",
    "link-local, cloud metadata": "169.254.169.254",
    "link-local v6": "fe80::1",
    "CGNAT": "100.64.0.1",
    "unique local v6": "fd00::1",
    "multicast": "224.0.0.1",
    "multicast v6": "ff02::1",
    "broadcast": "255.255.255.255",
    "benchmarking": "198.18.0.1",
    "documentation": "192.0.2.1",
    "6to4 of loopback": "2002:7f00:1::1",
    "6to4 of a public address": "2002:808:808::1",
    "Teredo": "2001::1",
    "NAT64 of loopback": "64:ff9b::7f00:1",
    "NAT64 of a public address": "64:ff9b::808:808",
    "NAT64, local": "64:ff9b:1::1",
    "v4-mapped loopback": "::ffff:127.0.0.1",
    "v4-mapped public": "::ffff:8.8.8.8",
    "v4-compatible": "::127.0.0.1",
    "translated loopback": "::ffff:0:127.0.0.1",
    "ISATAP of loopback": "2606:4700::5efe:7f00:1",
    "ISATAP of a private address": "2606:4700::200:5efe:a00:1",
    "site-local v6": "fec0::1",
    "documentation v6": "2001:db8::1",
    "documentation v6, larger": "3fff::1",
    "segment routing": "5f00::1",
    "protocol assignments": "192.0.0.9",
    "protocol assignments v6": "2001:1::1",
    "6to4 relays": "192.88.99.1",
    "discard v6": "100::1",
    "not given out": "4000::1",
}


class Row(NamedTuple):
    """A request and what it must get.

    Attributes:
        body: JSON as an object, or bytes.
        status: of the answer.
        says: part of its message.
        send: for what is no ordinary request: from a connected socket to status and whole answer.
        route: that it goes to.
        headers: beside that of JSON, or in its place.
    """

    body: dict | bytes
    status: int
    says: str
    send: Callable[[socket.socket], tuple[int, str]] | None = None
    route: str = CHAT
    headers: Mapping[str, str] = {}


def ask(port: int, row: Row) -> tuple[int, str]:
    """Sends a row to a server on this machine; returns status and message."""
    if row.send is not None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            return row.send(connection)
    body = row.body
    if isinstance(body, dict):
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], **body}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", row.route, body, {"Content-Type": "application/json", **row.headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]["message"]


@contextlib.contextmanager
def hostile_host() -> Iterator[Callable[..., socket.socket]]:
    """A web host that misbehaves by path, as a ``FetchRules.connector`` that leads to it from any address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            path = self.request.recv(65536).decode(errors="replace").split(" ")[1]
            with contextlib.suppress(OSError):
                for piece in _answer(path):
                    self.request.sendall(piece)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield lambda address, timeout: socket.create_connection(server.server_address, timeout=timeout)
        finally:
            server.shutdown()
            thread.join()


def hostile_config(name: str, connector: Callable[..., socket.socket], *, timeout: float) -> ServerConfig:
    """A server with low limits that fetches from ``images.example``; ``timeout`` of bodies and fetches, seconds."""
    fetch = FetchRules(("images.example",), timeout=timeout, resolver=Resolver(), connector=connector)
    images = ImageRules(max_images=3, max_bytes=700_000, max_pixels=4_200_000, seconds=0.03, fetch=fetch)
    return ServerConfig(
        name,
        timeout=20,
        head_timeout=timeout,
        body_timeout=timeout,
        max_body_bytes=1_000_000,
        max_text_bytes=950_000,
        images=images,
    )


class Resolver:
    """Names to addresses: the first label says which."""

    def __init__(self):
        self._asked = 0

    def __call__(self, host: str, port: int) -> list[str]:
        label = host.split(".")[0]
        if label == "hanging":
            time.sleep(10)
        if label == "nowhere":
            raise OSError("no such name")
        if label == "changing":
            self._asked += 1
            return [OUTSIDE] if self._asked % 2 else ["10.0.0.1"]
        if label == "both":
            return [OUTSIDE, "10.0.0.1"]
        if label.startswith("inside"):
            return [list(INSIDE.values())[int(label.removeprefix("inside"))]]
        return [OUTSIDE]


def _answer(path: str) -> Iterator[bytes]:
    if path == "/redirects":
        yield b"HTTP/1.1 302 Found\r\nLocation: /redirects\r\nContent-Length: 0\r\n\r\n"
    elif path == "/inside":
        yield b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    elif path == "/file":
        yield b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
    elif path == "/slow":
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        yield from _for_ever(b"x")
    elif path == "/slow-head":
        yield b"HTTP/1.1 200 OK\r\n"
        yield from _for_ever(b"X-A: b\r\n")
    elif path == "/endless":
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        while True:
            yield bytes(65536)
    elif path == "/gzip":
        yield b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n" + zlib.compress(bytes(100_000))
    elif path == "/page":
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    elif path == "/bomb":
        content = png(8_000, 8_000)
        yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def _for_ever(piece: bytes) -> Iterator[bytes]:
    while True:
        time.sleep(0.05)
        yield piece


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black image in few bytes, with further chunks."""
    content = saved(Image.new("1", (width, height)), "PNG")
    return content[:33] + b"".join(chunk(*each) for each in chunks) + content[33:]


def _claims(width: int, height: int) -> bytes:
    """The head of a PNG that says it is this large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def _gif(side: int) -> bytes:
    """A small image on a large screen."""
    content = saved(Image.new("P", (8, 8)), "GIF")
    return content[:6] + struct.pack("<HH", side, side) + content[10:]


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def uri(content: bytes, kind: str = "image/png") -> str:
    """A data: URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def with_url(*urls: str) -> dict:
    """A request with images by URL."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}


def _raw(content: bytes) -> Callable[[socket.socket], tuple[int, str]]:
    def send(connection: socket.socket) -> tuple[int, str]:
        connection.sendall(content)
        return _received(connection)

    return send


def _slowly(start: bytes) -> Callable[[socket.socket], tuple[int, str]]:
    """What follows comes a byte at a time, until the server has had enough."""

    def send(connection: socket.socket) -> tuple[int, str]:
        connection.sendall(start)
        while not select.select([connection], [], [], 0.05)[0]:
            connection.sendall(b" ")
        return _received(connection)

    return send


def _received(connection: socket.socket) -> tuple[int, str]:
    """Status and whole answer; 0 and nothing where the server just closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            answer += chunk
            head, _, body = answer.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
            if length and len(body) >= int(length):
                break
    return int(answer.split(b" ")[1]) if answer else 0, answer.decode(errors="replace")


def _image_rows() -> dict[str, Row]:
    wide = struct.pack("<IHHIIiiHH", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24)
    contents = {
        "a bomb of pixels": (png(8_000, 8_000), "the limit is 4200000"),
        "a bomb by URL": ("http://a.images.example/bomb", "the limit is 4200000"),
        "two thousand million pixels": (_claims(2**31 - 1, 2**31 - 1), "limit"),
        "a bomb of text": (png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))), "damaged"),
        "a GIF larger than said": (_gif(65_535), "limit"),
        "a BMP that claims much": (b"BM" + wide + bytes(99), "limit"),
        "a JPEG of 2,000 scans": (many_scans(800, 2_000), "scans"),
        "a BMP of single pixels": (bmp_runs(41_000, 102, b"\1\0\0\0" * 102), "takes more than 0.03 s to decode"),
        **{name: (slow(690_000), "takes more than 0.03 s to decode") for name, slow in SLOW.items()},
        "long and thin": (saved(Image.new("1", (1_000_000, 1)), "PNG"), "too long and thin"),
        "cut short": (saved(_noise(), "PNG")[:6000], "truncated or damaged"),
        "a TIFF": (b"II*\x00" + bytes(100), "no image in one of the formats"),
        "an SVG": (b"<svg/>", "no image in one of the formats"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image in one of the formats"),
        "nothing": (b"", "empty"),
        "too many bytes": (b"\x89PNG" + bytes(705_000), "more than 700000 bytes"),
    }
    return {
        name: Row(with_url(content if isinstance(content, str) else uri(content)), 400, says)
        for name, (content, says) in contents.items()
    }


def _fetch_rows() -> dict[str, Row]:
    urls = {
        "10,000 redirects": ("http://a.images.example/redirects", "more than 3 redirects"),
        "a redirect inside": ("http://a.images.example/inside", "not among the allowed domains"),
        "a redirect to a file": ("http://a.images.example/file", "only http and https"),
        "a slow body": ("http://a.images.example/slow", "took too long"),
        "slow headers": ("http://a.images.example/slow-head", "took too long"),
        "an endless body": ("http://a.images.example/endless", "larger than the limit"),
        "a compressed body": ("http://a.images.example/gzip", "compressed body"),
        "a page": ("http://a.images.example/page", "no image in one of the formats"),
        "no answer": ("http://a.images.example/silence", "closed the connection early"),
        "a lookup that hangs": ("http://hanging.images.example/x", "took too long"),
        "a name of nobody": ("http://nowhere.images.example/x", "cannot be resolved"),
        "an answer that changes": ("http://changing.images.example/redirects", "not public"),
        "two addresses, one inside": ("http://both.images.example/x", "not public"),
        "another domain": ("http://elsewhere.example/x", "not among the allowed domains"),
        "a domain that ends alike": ("http://evilimages.example/x", "not among the allowed domains"),
        "an address as a number": ("http://2130706433/x", "not among the allowed domains"),
        "an address in hexadecimal": ("http://0x7f.1/x", "not among the allowed domains"),
        "an address in brackets": ("http://[::ffff:127.0.0.1]/x", "not among the allowed domains"),
        "a name and a password": ("http://images.example:x@127.0.0.1/", "with a user name"),
        "a strange port": ("http://images.example:99999/x", "not a URL"),
        "letters that are not ASCII": ("http://images.example/\u00e4.png", "write others as %XX"),
        "line breaks": ("http://images.example/x\r\nHost: evil", "no control characters"),
        "another scheme": ("gopher://images.example/x", "images come as data: URIs"),
        "a file": ("file:///etc/passwd", "by file: URL are not enabled"),
        "a path": ("../../etc/passwd", "images come as data: URIs"),
        "broken base64": ("data:image/png;base64,@@@", "broken base64"),
        "no base64": ("data:text/html,<b>", "without ;base64"),
        "half a character in a URL": ("http://images.example/\ud800", "half a character"),
    }
    rows = {name: Row(with_url(url), 400, says) for name, (url, says) in urls.items()}
    for i, name in enumerate(INSIDE):
        rows[f"inside: {name}"] = Row(with_url(f"http://inside{i}.images.example/x"), 400, "not public")
    return rows


def _request_rows() -> dict[str, Row]:
    text = [{"type": "text", "text": "a"}]
    wrong = {
        "no messages": ({"messages": []}, "messages"),
        "messages of a wrong type": ({"messages": "a"}, "messages: Input should be a valid list"),
        "unknown field": ({"tool": []}, "tool: no field that this server knows"),
        "a tool": ({"tools": [{}]}, "tools: not supported"),
        "half a character in a field": ({"\ud800": 1}, "half a character"),
        "half a character in the text": ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        "strange role": ({"messages": [{"role": "root", "content": "a"}]}, "messages.0.role"),
        "empty prompt": ({"messages": [{"role": "user", "content": ""}]}, "prompt is empty"),
        "text as a number": ({"max_tokens": "8"}, "max_tokens: Input should be a valid integer"),
        "a boolean": ({"max_tokens": True}, "max_tokens"),
        "a fraction": ({"max_tokens": 1.5}, "max_tokens"),
        "negative tokens": ({"max_tokens": -1}, "max_tokens"),
        "negative temperature": ({"temperature": -0.5}, "temperature"),
        "huge temperature": ({"temperature": 1e300}, "temperature"),
        "NaN as text": ({"temperature": "NaN"}, "temperature"),
        "huge seed": ({"seed": 2**80}, "seed"),
        "a seed of 65 bits": ({"seed": -(2**63) - 1}, "seed"),
        "a number that is no float": ({"temperature": 10**400}, "temperature"),
        "more tokens than can be counted": ({"max_tokens": 10**4000}, "max_tokens"),
        "huge top_k": ({"top_k": 10**12}, "top_k"),
        "negative top_k": ({"top_k": -5}, "top_k"),
        "top_p above 1": ({"top_p": 1.5}, "top_p"),
        "a penalty that is not served": ({"frequency_penalty": 0.5}, "frequency_penalty: not supported"),
        "alternatives by the thousand": ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        "alternatives of nothing": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        "too many choices": ({"n": 1000}, "n: "),
        "too many stops": ({"stop": ["a"] * 10_000}, "at most 8 items"),
        "numbers for stops": ({"stop": [0] * 90_000}, "stop.0: Input should be a valid string"),
        "lists for stops": ({"stop": [[]] * 60_000}, "stop.0: Input should be a valid string"),
        "empty stop": ({"stop": ""}, "at least 1 character"),
        "an empty one among stops": ({"stop": ["a", ""]}, "at least 1 character"),
        "a long stop": ({"stop": ["a" * 900_000]}, "at most 256 characters"),
        "a long name": ({"user": "a" * 900_000}, "at most 512 characters"),
        "a long salt": ({"cache_salt": "a" * 900_000}, "at most 512 characters"),
        "a long field": ({"a" * 900_000: 0}, "no field that this server knows"),
        "a long role": ({"messages": [{"role": "a" * 900_000, "content": "a"}]}, "messages.0.role"),
        "a long kind of part": (
            {"messages": [{"role": "user", "content": [{"type": "a" * 900_000}]}]},
            "messages.0.content.0",
        ),
        "900 fields of a message": (
            {"messages": [{"role": "user", "content": "a"} | {str(i): 0 for i in range(900)}] * 90},
            "no field that this server knows",
        ),
        "max_tokens beyond the context": ({"max_tokens": 2**40}, "the context holds"),
        "a prompt beyond the context": ({"messages": [{"role": "user", "content": "ab " * 3_000}]}, "context"),
        "900,000 characters": ({"messages": [{"role": "user", "content": "ab " * 300_000}]}, "characters, more than"),
        "10,000 messages": ({"messages": [{"role": "user", "content": "a"}] * 10_000}, "at most 2000 items"),
        "25,000 parts": ({"messages": [{"role": "user", "content": text * 25_000}]}, "at most 20000 items"),
        "wrong parts by the thousand": ({"messages": [{"role": "user", "content": [1] * 15_000}]}, "content"),
        "10,000 images": (with_url(*["x"] * 10_000), "has 10000 images, at most 3"),
        "four images": (with_url(*[uri(png(8, 8))] * 4), "has 4 images, at most 3"),
    }
    rows = {name: Row(body, 400, says) for name, (body, says) in wrong.items()}
    content = {"type": "image_url", "image_url": {"url": uri(png(8, 8))}}
    rows["an image in an answer"] = Row(
        {"messages": [{"role": "assistant", "content": [content]}]}, 400, "holds text alone"
    )
    rows["another model"] = Row({"model": "gpt-9"}, 404, "the model here is")
    rows["no JSON"] = Row(b"{", 400, "is not JSON")
    rows["not UTF-8"] = Row(b'{"messages": "\xff"}', 400, "is not UTF-8")
    rows["no object"] = Row(b"[1]", 400, "valid dictionary")
    rows["nested lists"] = Row(b"[" * 200_000, 400, "is not JSON")
    rows["nested objects"] = Row(b'{"a":' * 100_000, 400, "is not JSON")
    rows["NaN"] = Row(
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "NaN is not a number"
    )
    rows["1e999"] = Row(b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "temperature")
    rows["a number of 100,000 digits"] = Row(b'{"seed": ' + b"9" * 100_000 + b"}", 400, "is not JSON")
    rows["60,000 fields"] = Row({str(i): 0 for i in range(60_000)}, 400, "an object of 60001 fields")
    rows["100,000 empty lists"] = Row(b"[" + b"[]," * 99_000 + b"[]]", 400, "valid dictionary")
    for name, piece in {"lists": b"[],", "objects": b"{},", "numbers": b"0,", "texts": b'"",'}.items():
        rows[f"{name} by the hundred thousand"] = Row(b"[" + piece * 210_000 + b"0]", 400, "at most 200000 are taken")
    rows["no text, and much of it"] = Row({"user": "a" * 960_000}, 413, "bytes beside its images")
    rows["an end of an image that is none"] = Row(b'{"messages":["data:' + b"a" * 960_000, 413, "beside its images")
    rows["escapes"] = Row(b'{"user":"' + b"\\u00e9" * 150_000 + b'"}', 400, "user: String should have at most 512")
    rows["a huge body"] = Row(b"x" * 1_100_000, 413, "more than 1000000 bytes")
    looked = {"messages": with_url(uri(png(8, 8)))["messages"], "answer": "b " * 400_000}
    rows["no tokens to look at"] = Row({"answer": [[]] * 60_000}, 400, "answer.0", route="/v1/attention")
    rows["a layer beyond all"] = Row({"answer": "a", "layer": 10**30}, 400, "layer", route="/v1/attention")
    rows["a huge answer to look at"] = Row(looked, 400, "context", route="/v1/attention")
    return rows


def _form_rows() -> dict[str, Row]:
    rows = {f"schema: {name}": Row({"guided_json": schema}, 400, says) for name, (schema, says) in SCHEMAS.items()}
    wrong = {
        "an expression that is none": ({"guided_regex": "(a"}, "guided_regex: invalid regex"),
        "an expression that looks around": ({"guided_regex": "(?=a)b"}, "look-around"),
        "an expression of nothing": ({"guided_regex": r"[^\s\S]"}, "allows no token"),
        "brackets in brackets": ({"guided_regex": "(" * 9_000 + "a" + ")" * 9_000}, "guided_regex: invalid regex"),
        "choices without end": ({"guided_choice": ["a"] * 100_000}, "guided_choice"),
        "long choices": ({"guided_choice": [str(i) * 20 for i in range(2_000)]}, "at most 65536 are taken"),
        "no choice": ({"guided_choice": []}, "guided_choice"),
        "a schema that is no JSON": ({"guided_json": "{"}, "the schema is no JSON"),
        "a schema of brackets": ({"guided_json": "[" * 60_000}, "the schema is no JSON"),
        "two forms": ({"guided_regex": "a", "guided_choice": ["b"]}, "an answer has one form"),
    }
    return rows | {name: Row(body, 400, says) for name, (body, says) in wrong.items()}


def _connection_rows() -> dict[str, Row]:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    sent = {
        "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", 400),
        "a negative length": (head + b"Content-Length: -5\r\n\r\n", 400),
        "a length that is no number": (head + b"Content-Length: 1e3\r\n\r\n", 400),
        "two lengths": (head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        "a huge length": (head + b"Content-Length: 99999999999999\r\n\r\n", 413),
        "a broken chunk": (head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        "a huge header": (head + b"X: " + b"a" * 200_000 + b"\r\n\r\n", 400),
        "a strange path": (b"GET /%ff%00/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        "another method": (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    }
    rows = {name: Row(b"", status, "", _raw(content)) for name, (content, status) in sent.items()}
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    rows["chunks of a byte"] = Row(b"", 400, "", _raw(head + chunked + b"1\r\n \r\n" * 50_000))
    rows["a slow request"] = Row(b"", 408, "did not arrive within", _slowly(head + b"Content-Length: 100000\r\n\r\n"))
    rows["slow headers of a request"] = Row(b"", 0, "", _slowly(head + b"X: "))
    rows["a request that never begins"] = Row(b"", 0, "", _raw(b""))
    rows["a body behind its answer"] = Row(
        b"", 413, "more than 1000000", _slowly(head + b"Content-Length: 10000000\r\n\r\n")
    )
    return rows


def _page_rows() -> dict[str, Row]:
    """What pages of other sites make their visitors' browsers send."""
    chat = {"max_tokens": 1}
    wrong = {
        "a page of another site": ({"Origin": "https://evil.example"}, 403, "pages of 'https://evil.example' may not"),
        "a page of another port": ({"Origin": "http://127.0.0.1:1"}, 403, "may not use this server"),
        "a page without a site": ({"Origin": "null"}, 403, "may not use this server"),
        "an origin that is none": ({"Origin": "http://[::1"}, 403, "may not use this server"),
        "another site, said by the browser": ({"Sec-Fetch-Site": "cross-site"}, 403, "pages of other sites"),
        "a neighbouring site": ({"Sec-Fetch-Site": "same-site"}, 403, "pages of other sites"),
        "a form that leads here": (
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
            403,
            "pages of other sites",
        ),
        "a name that leads here": ({"Host": "evil.example"}, 403, "--allow-host 'evil.example'"),
        "a name that looks like an address": ({"Host": "127.0.0.1.evil.example:8000"}, 403, "--allow-host"),
        "a name that ends alike": ({"Host": "notlocalhost"}, 403, "--allow-host"),
        "no name": ({"Host": ""}, 403, "--allow-host"),
        "text": ({"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type: application/json"),
        "a form of parts": ({"Content-Type": "multipart/form-data; boundary=a"}, 415, "Content-Type: application/json"),
        "two types": ({"Content-Type": "text/plain, application/json"}, 415, "Content-Type: application/json"),
        "an empty type": ({"Content-Type": ""}, 415, "Content-Type: application/json"),
    }
    return {name: Row(chat, status, says, headers=headers) for name, (headers, status, says) in wrong.items()}


ROWS = {**_image_rows(), **_fetch_rows(), **_request_rows(), **_form_rows(), **_page_rows(), **_connection_rows()}

_LARGEST = 32 * 2**20 - 1_000


def _filled(start: bytes, piece: bytes, end: bytes) -> Callable[[], bytes]:
    return lambda: start + piece * ((_LARGEST - len(start) - len(end)) // len(piece)) + end


_ASKED = b'{"messages":[{"role":"user","content":"a"}]'
# Bodies of the largest size that a server takes by default, built when they are sent; each must get a 4xx.
LARGE: dict[str, Callable[[], bytes]] = {
    "lists": _filled(b"[", b"[],", b"0]"),
    "objects": _filled(b"[", b"{},", b"0]"),
    "objects with a field": _filled(b"[", b'{"a":0},', b"0]"),
    "zeros": _filled(b"[", b"0,", b"0]"),
    "floats": _filled(b"[", b"1.1,", b"0]"),
    "long numbers": _filled(b"[", b"1" * 4_000 + b",", b"0]"),
    "one number": _filled(b"[", b"1", b"]"),
    "one fraction": _filled(b"[0.", b"1", b"]"),
    "texts": _filled(b"[", b'"",', b"0]"),
    "one text": _filled(_ASKED + b',"user":"', b"a", b'"}'),
    "one text of wide characters": _filled(_ASKED + b',"user":"\xf0\x9f\x98\x80', b"a", b'"}'),
    "escapes": _filled(_ASKED + b',"user":"', b"\\u00e9", b'"}'),
    "halves of characters": _filled(_ASKED + b',"user":"', b"\\ud83d", b'"}'),
    "backslashes": _filled(_ASKED + b',"user":"', b"\\\\", b'"}'),
    "slashes in an image": _filled(b'["data:', b"\\/", b'"]'),
    "beginnings of images": _filled(b"[", b'"data:"', b"]"),
    "an image without an end": _filled(b'["data:', b"a", b""),
    "spaces": _filled(b"[", b" ", b"]"),
    "brackets": _filled(b"", b"[", b""),
    "keys": lambda: _ASKED + b"".join(b',"%x":0' % i for i in range(2_800_000)) + b"}",
    "one key": _filled(_ASKED + b',"', b"a", b'":0}'),
    "parts": _filled(b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b"0]}]}"),
    "lists for parts": _filled(b'{"messages":[{"role":"user","content":[', b"[],", b"0]}]}"),
    "lists for stops": _filled(_ASKED + b',"stop":[', b"[],", b"0]}"),
    "numbers for stops": _filled(_ASKED + b',"stop":[', b"0,", b"0]}"),
    "an image for a stop": _filled(_ASKED + b',"stop":["data:image/png;base64,', b"iVBO", b'"]}'),
    "images for stops": _filled(_ASKED + b',"stop":[', b'"data:image/png;base64,' + b"iVBO" * 300 + b'",', b"0]}"),
    "an image for a name": _filled(_ASKED + b',"data:image/png;base64,', b"iVBO", b'":0}'),
    "no bytes of text": _filled(b"", b"\xff", b""),
    "zero bytes": _filled(b"", b"\0", b""),
}
