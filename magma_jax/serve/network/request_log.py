"""Request log: one line per request with time, client, route, status and duration; never prompts or answers."""

import sys
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestLog:
    """Middleware that writes one line at the end of each request."""

    def __init__(self, app: ASGIApp, write: Callable[[str], None] = lambda line: print(line, file=sys.stderr)):
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, ended = time.perf_counter(), "-", False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, watched)
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            # Paths are untrusted: control characters must not reach a terminal.
            path = scope["path"][:200].encode("unicode_escape").decode("ascii")
            seconds, moment = time.perf_counter() - started, time.strftime("%Y-%m-%d %H:%M:%S")
            broken = "" if ended else " broken off"
            self._write(f"{moment} {client} {scope['method']} {path} {status} {seconds:.3f} s{broken}")
