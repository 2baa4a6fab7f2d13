"""ASGI middleware between the network and the routes: access control and request counts."""

import asyncio
import base64
import hmac
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError, error_response
from magma_jax.serve.network.origin import check_content_type, check_origin
from magma_jax.serve.prometheus import ServerMetrics


class Guard:
    """Checks origin and key, counts requests and adds headers, without buffering streams.

    Args:
        app: the wrapped application.
        config: config with key, host names and origins.
        metrics: request counters.
        unlocked: routes that need no key.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, metrics: ServerMetrics, unlocked: frozenset[str] = frozenset()
    ):
        self._app, self._config, self._metrics, self._unlocked = app, config, metrics, unlocked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        route, started = route_of(scope), False

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.count(route, message["status"])
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["method"], route, headers)
            app = self._app
        except RequestError as error:
            app = error_response(error)
            if error.status == 401:
                # Makes a browser ask for the key as a password.
                app.headers["WWW-Authenticate"] = 'Basic realm="magma_jax", charset="UTF-8"'
        try:
            await app(scope, receive, watched)
        except asyncio.CancelledError:  # the grace period of a shutdown is over
            if not started:
                await error_response(RequestError("the server is shutting down", 503))(scope, receive, watched)

    def _check(self, method: str, route: str, headers: Mapping[str, str]) -> None:
        check_origin(method, route, headers, self._config)
        key = self._config.api_key
        if key is not None and route not in self._unlocked and not _authorized(headers.get("authorization", ""), key):
            raise RequestError("wrong or missing API key", 401, code="invalid_api_key")
        check_content_type(method, route, headers)


def route_of(scope: Scope) -> str:
    """Request path below the server's root path, whether or not the proxy strips that prefix."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _authorized(header: str, key: str) -> bool:
    scheme, _, value = header.encode("latin-1").partition(b" ")
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(value, key.encode())
