"""The body of a request, from the network to checked fields, at a cost that its size bounds.

Whoever reads JSON holds the interpreter until it is read, and a byte of it can become fifty. So long pictures are taken
out of the text first, and what is left may have so many bytes and so many values: this is known before it is read.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError
from magma_jax.serve.schema import Asked, finite, parse

# Commas, colons and opening brackets in a request: there are no more values and keys than these. A chat of as many
# parts as are taken has half of it; base64 has none of these characters.
MAX_MARKS = 200_000
_MARKS = b",:[{"
# Backslashes in a request: a picture of the largest size has half as many where each of its slashes has one.
MAX_BACKSLASHES = 1_000_000
# Fields of one object: each that nobody knows makes an error of a kilobyte.
MAX_FIELDS = 1_000

# A string that holds a data: URI; some writers of JSON put a backslash before every slash.
_DATA_URI = re.compile(rb'"(data:[ !#-\[\]-~]*+(?:\\/[ !#-\[\]-~]*+)*+)"')
# Shorter ones stay where they are.
_LONG = 1_024
# Stands in the text for a picture that was taken out of it; nobody else knows it.
_NAME = secrets.token_hex(16)


async def read_body(request: Request, kind: type[Asked], config: ServerConfig, hold: Callable[[int], None]) -> Asked:
    """The checked body of a request; ``hold`` is told of every chunk's bytes before it is kept.

    Raises:
        RequestError: too large, too slow, no JSON, or not what ``kind`` takes.
    """
    body, limit, seconds = bytearray(), config.max_body_bytes, config.body_timeout
    too_large = RequestError(f"the request has more than {limit} bytes", 413)
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large
                hold(len(chunk))
                body += chunk
    except ClientDisconnect:
        raise RequestError("the request broke off") from None
    except TimeoutError:
        raise RequestError(f"the request did not arrive within {seconds:g} s", 408) from None
    # Not here: a large one would keep everybody waiting.
    return await anyio.to_thread.run_sync(lambda: parse(read_json(body, config.max_text_bytes), kind))


def read_json(body: bytearray, max_text_bytes: int) -> Any:
    """The values that a body spells.

    Raises:
        RequestError: no JSON, or more of it than is read.
    """
    marks = sum(body.count(mark) for mark in _MARKS)
    if marks > MAX_MARKS:
        raise RequestError(f"the request has {marks} commas, colons and brackets, at most {MAX_MARKS} are taken")
    if body.count(b"\\") > MAX_BACKSLASHES:
        raise RequestError(f"the request has more than {MAX_BACKSLASHES} backslashes")
    text, pictures = _take_out_pictures(body, max_text_bytes)
    try:
        content = json.loads(text.decode(), parse_constant=finite, object_pairs_hook=_fields)
        if b"\\u" in text:  # an escape may spell half a character, which is no text
            json.dumps(content, ensure_ascii=False).encode()
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not UTF-8 ({error.reason})") from None
    except UnicodeEncodeError:
        raise RequestError("the request spells half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        # Where something is wrong is told only if it stands there: not behind a picture that was taken out.
        reason = getattr(error, "msg", error) if pictures else error
        raise RequestError(f"the request is no JSON ({reason!s:.100})") from None
    if pictures:
        _put_back(content, pictures)
    return content


def _take_out_pictures(body: bytearray, max_text_bytes: int) -> tuple[bytes, dict[str, str]]:
    """The body with a name in place of every long data: URI, and what the names stand for."""
    whole, kept, pictures, end = memoryview(body), [], {}, 0
    for found in _DATA_URI.finditer(body):
        start, stop = found.span(1)
        # Behind a backslash it is no string that begins, but a quotation mark within one.
        if stop - start < _LONG or body[max(start - 2, 0)] == ord("\\"):
            continue
        name = f"{_NAME}:{len(pictures)}"
        pictures[name] = str(whole[start:stop], "ascii").replace("\\/", "/")
        kept += [whole[end:start], name.encode()]
        end = stop
    kept.append(whole[end:])
    size = sum(map(len, kept))
    if size > max_text_bytes:
        raise RequestError(f"the request has {size} bytes beside its pictures, at most {max_text_bytes} are taken", 413)
    return b"".join(kept), pictures


def _put_back(content: Any, pictures: dict[str, str]) -> None:
    """Replaces the names of pictures by what they stand for, in place."""
    waiting = [content] if isinstance(content, dict | list) else []
    while waiting:
        values = waiting.pop()
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif isinstance(value, str) and value in pictures:
                values[key] = pictures[value]


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_FIELDS:
        raise RequestError(f"the request has an object of {len(pairs)} fields, at most {MAX_FIELDS} are taken")
    return dict(pairs)
