"""Reads and validates request bodies at a bounded cost.

Parsing JSON holds the GIL, and one byte of it can take fifty bytes of objects. So long images are removed from the text
first, and the rest is checked against limits on bytes and values before it is parsed.
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

# Limit on commas, colons and opening brackets, which bounds the number of values and keys. A chat with the maximum
# number of parts has half as many; base64 contains none of these characters.
MAX_MARKS = 200_000
_MARKS = b",:[{"
# Limit on backslashes; an image of the largest size with escaped slashes has half as many.
MAX_BACKSLASHES = 1_000_000

# A string with a data: URI that is not a key; some JSON encoders escape every slash.
_DATA_URI = re.compile(rb'"(data:[ !#-\[\]-~]*+(?:\\/[ !#-\[\]-~]*+)*+)"(?!\s*+:)')
# Shorter data: URIs stay in the text.
_LONG = 1_024
# Placeholder prefix of removed images; secret, so that no request can contain it.
_NAME = secrets.token_hex(16)


async def read_body(request: Request, kind: type[Asked], config: ServerConfig, hold: Callable[[int], None]) -> Asked:
    """Reads and validates the body of a request; ``hold`` is called with the size of every chunk before it is kept.

    Raises:
        RequestError: too large, too slow, not JSON, or not valid for ``kind``.
    """
    # In a thread, since a large body would block the event loop.
    found = await anyio.to_thread.run_sync(_read, await receive(request, config, hold), kind, config.max_text_bytes)
    if isinstance(found, RequestError):
        raise found
    return found


async def receive(request: Request, config: ServerConfig, hold: Callable[[int], None]) -> bytearray:
    """The bytes of a body; ``hold`` as in ``read_body``.

    Raises:
        RequestError: too large or too slow.
    """
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
        body.clear()  # the error's traceback may keep it alive
        raise RequestError("the request was cut short") from None
    except TimeoutError:
        body.clear()
        raise RequestError(f"the request did not arrive within {seconds:g} s", 408) from None
    except RequestError:
        body.clear()
        raise


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the request has more than {limit} bytes", 413)


def _read(body: bytearray, kind: type[Asked], max_text_bytes: int) -> Asked | RequestError:
    """Validated fields of a body, or the error.

    The error is returned, since the traceback of a raised one keeps its frames' objects alive until garbage collection.
    """
    try:
        return parse(read_json(body, max_text_bytes), kind)
    except RequestError as error:
        return RequestError(str(error), error.status, error.param, error.code)


def read_json(body: bytearray, max_text_bytes: int) -> Any:
    """Parses a JSON body.

    Raises:
        RequestError: not JSON, or above a limit.
    """
    marks = sum(body.count(mark) for mark in _MARKS)
    if marks > MAX_MARKS:
        raise RequestError(f"the request has {marks} commas, colons and brackets, at most {MAX_MARKS} are taken")
    if body.count(b"\\") > MAX_BACKSLASHES:
        raise RequestError(f"the request has more than {MAX_BACKSLASHES} backslashes")
    text, images = _take_out_images(body, max_text_bytes)
    try:
        content = json.loads(text.decode(), parse_constant=finite)
        if b"\\u" in text:  # an escape may encode a lone surrogate, which is not valid text
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not UTF-8 ({error.reason})") from None
    except UnicodeEncodeError:
        raise RequestError("the request spells half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        # Error positions are wrong after a removed image, so they are omitted.
        reason = getattr(error, "msg", error) if images else error
        raise RequestError(f"the request is not JSON ({reason!s:.100})") from None
    return _put_back(content, images) if images else content


def _take_out_images(body: bytearray, max_text_bytes: int) -> tuple[bytes, dict[str, str]]:
    """Body with a placeholder for every long data: URI, and the images by placeholder."""
    spans = (found.span(1) for found in _DATA_URI.finditer(body))
    # After a backslash it is an escaped quotation mark within a string, not the start of one.
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
    """Replaces the placeholders by their images."""
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
