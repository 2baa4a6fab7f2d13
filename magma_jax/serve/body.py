"""The body of a request, from the network to checked fields."""

import asyncio
import json
from collections.abc import Callable

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError
from magma_jax.serve.schema import Asked, finite, parse


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

    def work() -> Asked:
        content = json.loads(body.decode(), parse_constant=finite)
        if b"\\u" in body:  # an escape may spell half a character, which is no text
            json.dumps(content, ensure_ascii=False).encode()
        return parse(content, kind)

    try:
        # Not here: a large one would keep everybody waiting.
        return await anyio.to_thread.run_sync(work)
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise RequestError("the request spells half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is no JSON ({error!s:.100})") from None
