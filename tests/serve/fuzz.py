"""Random requests, each known by its seed and number: JSON, images and bare bytes, mostly near to what is right."""

import contextlib
import copy
import io
import json
import random
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from tests.serve.hostile import CHAT, uri

LOOK, TEXT = "/v1/attention", "/v1/completions"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# In place of a value of a request.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, "", "a", "user",
    "\0", "\u00e9", "\U0001f600", "\ud800", "a" * 1_000, "a" * 70_000, "data:", "data:image/png;base64,", "file:///etc",
    "http://127.0.0.1/", [], {}, [[]], [None], ["a"] * 9, [0] * 300, {"": {}}, {"type": "text"}, {"type": "image_url"},
    {"type": "text", "text": "a"}, {"url": "x"}, {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "(a*)*b", "[\\d", {str(i): i for i in range(1_100)},
)  # fmt: skip
FIELDS = ("model", "messages", "role", "content", "type", "text", "image_url", "url", "detail", "name", "user", "stop")
FIELDS += ("seed", "n", "stream", "logprobs", "top_logprobs", "temperature", "top_p", "min_p", "top_k", "cache_salt")
FIELDS += ("max_tokens", "min_tokens", "tools", "response_format", "answer", "layer", "head", "relative", "__class__")
FIELDS += ("prompt", "echo", "suffix", "template", "metadata", "logit_bias", "structured_outputs", "guided_choice")
FIELDS += ("guided_json", "guided_regex", "json_schema", "schema", "ignore_eos", "best_of", "continuous_usage_stats")
# Bytes of a repeated list; twice the body that a server takes.
LARGEST = 64 * 2**20
HEADERS = ("Host", "Content-Length", "Transfer-Encoding", "Expect", "Connection", "Content-Type", "Origin", "Upgrade")
HEADERS += ("Authorization", "Cookie", "X-Forwarded-For", "Range", "Accept-Encoding", "Sec-Fetch-Site")


VALUES = ("", "0", "-1", "1e9", "close", "upgrade", "websocket", "chunked", "100-continue", "localhost", "a" * 70_000)


class Case(NamedTuple):
    """A request.

    Attributes:
        kind: "json", "image" or "bytes".
        pieces: bytes for a connection, sent one by one.
        reads: whether the client stays for the answer.
        ends: whether there must be an answer, behind which the server closes.
    """

    kind: str
    pieces: tuple[bytes, ...]
    reads: bool = True
    ends: bool = False


def case(seed: int, number: int) -> Case:
    """The same for the same numbers."""
    rng = random.Random(f"{seed}/{number}")
    kind, make = rng.choice(tuple(_KINDS.items()))
    return make(rng)._replace(kind=kind)


def send(port: int, sent: Case, timeout: float) -> list[int]:
    """Sends a case; gives the statuses of all answers.

    Raises:
        TimeoutError: there was to be an answer and an end of it within so many seconds.
    """
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(ConnectionError))
        for piece in sent.pieces:
            connection.sendall(piece)
        if not sent.ends:  # nobody waits for the rest
            connection.settimeout(0.3 if sent.reads else 0.001)
            stack.enter_context(contextlib.suppress(TimeoutError))
        while chunk := connection.recv(65536):
            answer += chunk
    lines = [line for line in answer.split(b"\n") if line.startswith(b"HTTP/1.1 ") or b"}HTTP/1.1 " in line]
    return [int(line.split(b"HTTP/1.1 ")[1][:3]) for line in lines]


def _json(rng: random.Random) -> Case:
    route, body = _request(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        _change(rng, body)
    content = json.dumps(body, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = _damaged(rng, content)
    return _post(route, content)._replace(**rng.choice(({}, {}, {}, {"ends": False, "reads": False})))


def _image_case(rng: random.Random) -> Case:
    _, body = _request(rng, text_only=True)
    images = [_damaged(rng, _image(rng)) for _ in range(rng.randint(1, 3))]
    parts = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    body["messages"].insert(0, {"role": "user", "content": parts})
    route = CHAT
    if rng.random() < 0.3:
        route, body = LOOK, {"messages": body["messages"], "answer": " a red"}
    return _post(route, json.dumps(body).encode())


def _bytes(rng: random.Random) -> Case:
    route, body = _request(rng)
    content = json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))}
    for _ in range(rng.randrange(4)):
        headers[rng.choice(HEADERS)] = rng.choice(VALUES)
    for name in rng.sample(sorted(headers), rng.randrange(2)):
        del headers[name]
    if headers.get("Transfer-Encoding") == "chunked" and rng.random() < 0.8:
        headers.pop("Content-Length", None)
        size = rng.choice((1, 7, 1_000))
        chunks = [content[at : at + size] for at in range(0, len(content), size)]
        content = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    method = rng.choice(("POST", "POST", "POST", "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PRI", "CONNECT", "a"))
    path = rng.choice((route, route, "/", "/health", "/metrics", "/v1/models", "*", "//", "/%00", "/..", "http://a/"))
    version = rng.choice(("1.1", "1.1", "1.1", "1.0", "0.9", "2.0", "1.11"))
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in headers.items())]
    whole = rng.choice(("\r\n", "\r\n", "\r\n", "\n")).join([*lines, "", ""]).encode() + content
    whole *= rng.choice((1, 1, 2, 20))
    if rng.random() < 0.6:
        whole = _damaged(rng, whole)
    cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.choice((0, 0, 1, 5))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return Case("", tuple(pieces), reads=rng.random() < 0.8)


_KINDS: dict[str, Callable[[random.Random], Case]] = {"json": _json, "image": _image_case, "bytes": _bytes}


def _post(route: str, content: bytes) -> Case:
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return Case("", (head.encode() + content,), ends=True)


def _request(rng: random.Random, text_only: bool = False) -> tuple[str, dict[str, Any]]:
    """A route and a body that it takes."""
    messages = []
    for _ in range(rng.randint(1, 3)):
        content: Any = rng.choice(("a", "A picture of", "caf\u00e9 \U0001f600", "Q: What colour is it? A:"))
        if rng.random() < 0.5:
            content = [{"type": "text", "text": content}]
            if rng.random() < 0.3 and not text_only:
                content.append({"type": "image_url", "image_url": {"url": uri(_image(rng)), "detail": "low"}})
        messages.append({"role": rng.choice(("system", "user", "user")), "content": content})
        if rng.random() < 0.3:
            messages.append({"role": "assistant", "content": "a"})
    if rng.random() < 0.2 and not text_only:
        image = [{"type": "image_url", "image_url": {"url": uri(_image(rng))}}]
        answer = rng.choice((" a red", [5, 6, 7]))
        return LOOK, {"messages": [{"role": "user", "content": image}, *messages], "answer": answer, "layer": 1}
    options = {
        "max_tokens": rng.randint(1, 12),
        "temperature": rng.choice((0, 0.7, 5.0)),
        "top_p": 0.9,
        "seed": rng.randrange(-(2**63), 2**63),
        "n": rng.randint(1, 3),
        "stop": rng.choice(("\n", ["red", "\u00e9"])),
        "stream": rng.random() < 0.5,
        "logprobs": True,
        "top_logprobs": 3,
        "return_token_ids": True,
        "cache_salt": "a",
    }
    if rng.random() < 0.2:
        forms = {"guided_choice": ["a", "b"], "guided_regex": "[ab]+c?", "response_format": {"type": "json_object"}}
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        forms["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        options = {**options, "max_tokens": 12, **dict([rng.choice(list(forms.items()))])}
    chosen = {name: options[name] for name in options if rng.random() < 0.4}
    if "logprobs" not in chosen:
        chosen.pop("top_logprobs", None)
    if rng.random() < 0.2 and not text_only:
        chosen = {name: value for name, value in chosen.items() if "logprobs" not in name}
        prompt = rng.choice(("a", ["a", "b"], [5, 6], [[5], [6, 7]], [{"type": "text", "text": "a"}]))
        return TEXT, {"prompt": prompt, "echo": rng.random() < 0.5, **chosen}
    return CHAT, {"messages": messages, "max_tokens": 3, **chosen}


def _change(rng: random.Random, body: dict[str, Any]) -> None:
    """Replaces, removes, repeats or adds a value somewhere within."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [body]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    if not places:
        return
    holder, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        times = rng.choice((2, 3, 50))
        if len(json.dumps(holder)) * times <= LARGEST:  # repeated lists of repeated lists would take gigabytes
            holder *= times
    elif how == 2 and isinstance(holder, dict):
        holder[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(STRANGE))
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))


def _image(rng: random.Random) -> bytes:
    mode = rng.choice(("1", "L", "P", "RGB", "RGBA"))
    size = rng.choice(((1, 1), (8, 8), (64, 64), (300, 7), (257, 255)))
    image = Image.frombytes("L", size, rng.randbytes(size[0] * size[1])).convert(mode)
    kind = rng.choice(FORMATS)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "BMP"):
        image = image.convert("RGB")
        options = {"progressive": rng.random() < 0.5} if kind == "JPEG" else {}
    if kind in ("GIF", "WEBP", "PNG") and rng.random() < 0.2:
        options = {"save_all": True, "append_images": [image] * 3}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _damaged(rng: random.Random, content: bytes) -> bytes:
    """With some bytes changed, removed, repeated, or from another place; sometimes as it was."""
    found = bytearray(content)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        if not found:
            break
        at, size = rng.randrange(len(found)), rng.choice((1, 2, 4, 100))
        how = rng.randrange(6)
        if how == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[at : at + size] = rng.randbytes(size)
        elif how == 2:
            del found[at : at + size]
        elif how == 3:
            found[at:at] = found[at : at + size] * rng.choice((1, 2, 1_000))
        elif how == 4:  # a length or a number of pixels
            found[at : at + size] = rng.choice((b"\0" * size, b"\xff" * size, (2**31 - 1).to_bytes(4, "big")))
        else:
            del found[at:]
    return bytes(found)
