"""What stands between the network and the routes: who may ask, and what is counted."""

import base64
import hmac

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magma_jax.serve.errors import RequestError, error_response
from magma_jax.serve.metrics import ServerMetrics


class Guard:
    """Asks for the key, counts, and adds headers, without standing between a stream and its client.

    Args:
        app: what is behind it.
        key: asked for; None for none.
        metrics: what counts.
        unlocked: routes that answer without the key.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: ServerMetrics, unlocked: frozenset[str] = frozenset()):
        self._app, self._key, self._metrics, self._unlocked = app, key, metrics, unlocked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        route = route_of(scope)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(route, message["status"])
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        app = self._app
        header = dict(scope["headers"]).get(b"authorization", b"")
        if self._key is not None and route not in self._unlocked and not _authorized(header, self._key):
            app = error_response(RequestError("wrong or missing API key", 401, code="invalid_api_key"))
            # A browser then asks for the key, as a password.
            app.headers["WWW-Authenticate"] = 'Basic realm="magma_jax", charset="UTF-8"'
        await app(scope, receive, watched)


def route_of(scope: Scope) -> str:
    """The path of a request below the server's root path, whether or not a proxy has left that on."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _authorized(header: bytes, key: str) -> bool:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(value, key.encode())
