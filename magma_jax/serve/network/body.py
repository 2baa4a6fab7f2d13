"""The body of a request, from the network to checked fields, at a cost that its size bounds.

Whoever reads JSON holds the interpreter until it is read, and a byte of it can become fifty. So long images are taken
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
from magma_jax.serve.requests.schema import Asked, finite, parse

# Commas, colons and opening brackets in a request: there are no more values and keys than these. A chat of as many
# parts as are taken has half of it; base64 has none of these characters.
MAX_MARKS = 200_000
_MARKS = b",:[{"
# Backslashes in a request: an image of the largest size has half as many where each of its slashes has one.
MAX_BACKSLASHES = 1_000_000

# A string that holds a data: URI and names no field; some writers of JSON put a backslash before every slash.
_DATA_URI = re.compile(rb'"(data:[ !#-\[\]-~]*+(?:\\/[ !#-\[\]-~]*+)*+)"(?!\s*+:)')
# Shorter ones stay where they are.
_LONG = 1_024
# Stands in the text for an image that was taken out of it; nobody else knows it.
_NAME = secrets.token_hex(16)


async def read_body(request: Request, kind: type[Asked], config: ServerConfig, hold: Callable[[int], None]) -> Asked:
    """The checked body of a request; ``hold`` is told of every chunk's bytes before it is kept.

    Raises:
        RequestError: too large, too slow, no JSON, or not what ``kind`` takes.
    """
    # In another thread: a large one would keep everybody waiting.
    found = await anyio.to_thread.run_sync(_read, await _receive(request, config, hold), kind, config.max_text_bytes)
    if isinstance(found, RequestError):
        raise found
    return found


async def _receive(request: Request, config: ServerConfig, hold: Callable[[int], None]) -> bytearray:
    body, limit, seconds = bytearray(), config.max_body_bytes, config.body_timeout
    try:
        if int(request.headers.get("content-length") or 0) > limit:
            raise _too_large(limit)
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise _too_large(limit)
                hold(len(chunk))
                body += chunk
        return body
    except ClientDisconnect:
        body.clear()  # the error's traceback may keep it for long
        raise RequestError("the request broke off") from None
    except TimeoutError:
        body.clear()
        raise RequestError(f"the request did not arrive within {seconds:g} s", 408) from None
    except RequestError:
        body.clear()
        raise


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the request has more than {limit} bytes", 413)


def _read(body: bytearray, kind: type[Asked], max_text_bytes: int) -> Asked | RequestError:
    """The checked fields of a body, or what is wrong with it.

    The error is returned, for what is raised keeps all that its frames hold until garbage is collected.
    """
    try:
        return parse(read_json(body, max_text_bytes), kind)
    except RequestError as error:
        return RequestError(str(error), error.status, error.param, error.code)


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
    text, images = _take_out_images(body, max_text_bytes)
    try:
        content = json.loads(text.decode(), parse_constant=finite)
        if b"\\u" in text:  # an escape may spell half a character, which is no text
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not UTF-8 ({error.reason})") from None
    except UnicodeEncodeError:
        raise RequestError("the request spells half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        # Where something is wrong is told only if it stands there: not behind an image that was taken out.
        reason = getattr(error, "msg", error) if images else error
        raise RequestError(f"the request is no JSON ({reason!s:.100})") from None
    return _put_back(content, images) if images else content


def _take_out_images(body: bytearray, max_text_bytes: int) -> tuple[bytes, dict[str, str]]:
    """The body with a name in place of every long data: URI, and what the names stand for."""
    spans = (found.span(1) for found in _DATA_URI.finditer(body))
    # Behind a backslash it is no string that begins, but a quotation mark within one.
    spans = [(a, b) for a, b in spans if b - a >= _LONG and body[max(a - 2, 0)] != ord("\\")]
    size = len(body) - sum(stop - start for start, stop in spans)
    if size > max_text_bytes:
        raise RequestError(f"the request has {size} bytes beside its images, at most {max_text_bytes} are taken", 413)
    text, images, end = bytearray(), {}, 0
    for start, stop in spans:
        name = f"{_NAME}:{len(images)}"
        images[name] = body[start:stop].decode("ascii").replace("\\/", "/")
        text += body[end:start] + name.encode()
        end = stop
    return bytes(text + body[end:]), images


def _put_back(content: Any, images: dict[str, str]) -> Any:
    """The content with images in place of their names."""
    whole = [content]
    waiting: list[Any] = [whole]
    while waiting:
        values = waiting.pop()
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif isinstance(value, str) and value in images:
                values[key] = images[value]
    return whole[0]
