"""The web application: OpenAI's routes, health, metrics and the page, over one engine or image queue."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from magma_jax.inference.batching.engine import Engine
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError, error_response
from magma_jax.serve.image_service import ImageService
from magma_jax.serve.network.guard import Guard
from magma_jax.serve.pages import read_page
from magma_jax.serve.prometheus import ServerMetrics
from magma_jax.serve.service import Service

_READ = ["GET", "HEAD"]


def create_app(
    engine: Engine | ImageQueue,
    config: ServerConfig = ServerConfig(),
    begun: Callable[[Exception | None], None] = lambda _: None,
) -> FastAPI:
    """Creates the application; it warms up the engine in a thread at startup and drains it at shutdown.

    An engine serves chat and text completions, an image queue serves images, and chat if its model writes too.

    Until the engine is warm, ``/health`` reports "starting" and the model's routes return 503. Then ``begun`` is called
    once, with None or with the error.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        loop = asyncio.get_running_loop()

        def tell(error: Exception | None) -> None:
            app.state.ready = error is None
            app.state.failure = error and f"the engine cannot start ({type(error).__name__}: {error!s:.300})"
            begun(error)

        def warm_up() -> None:
            error = None
            try:
                service.warm_up()
            except Exception as raised:  # any device error must be reported
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                loop.call_soon_threadsafe(tell, error)

        warming = threading.Thread(target=warm_up, name="warm-up", daemon=True)
        warming.start()
        yield
        app.state.ready = False
        service.close()
        if not warming.is_alive():  # otherwise the engine is compiling, which cannot be interrupted
            # All requests have ended or were cancelled, so the engine only finishes its current step.
            await asyncio.to_thread(engine.close, drain=True, timeout=1.0)

    app = FastAPI(title="magma_jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.ready, app.state.failure = False, None

    def stats() -> dict[str, int]:
        # The engine has no stats during its warm-up.
        return engine.stats()._asdict() if app.state.ready else dict.fromkeys(service.counters, 0)

    metrics_of_server = ServerMetrics(stats)
    service: Service | ImageService
    if isinstance(engine, Engine):
        service = Service(engine, config, metrics_of_server)
    else:
        service = ImageService(engine, config, metrics_of_server)
    unlocked = {"/health", *(["/metrics"] if config.open_metrics else [])}
    app.add_middleware(Guard, config=config, metrics=metrics_of_server, unlocked=frozenset(unlocked))
    if config.origins:
        # Outside the guard, since CORS preflight requests carry no key.
        allowed = {"allow_origins": config.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allowed)

    if config.root_path:
        app.add_middleware(_Below, root_path=config.root_path)

    def failure() -> str | None:
        return app.state.failure or engine.failure

    async def answered(work: Callable[[], Awaitable[Response]]) -> Response:
        try:
            if failure() is not None:
                raise RequestError(failure() or "", 503)
            if not app.state.ready:
                raise RequestError("the server is starting: it compiles; try again later", 503, code="starting")
            return await work()
        except RequestError as error:
            return error_response(error)

    @app.exception_handler(404)
    async def nothing_here(request: Request, _: Exception) -> Response:
        return error_response(RequestError(f"no such route: {request.method} {request.url.path[:80]}", 404))

    @app.exception_handler(405)
    async def other_method(request: Request, error: HTTPException) -> Response:
        allowed = ", ".join([*sorted((error.headers or {})["Allow"].split(", ")), "OPTIONS"])
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allowed})
        says = f"{request.url.path[:80]} takes {allowed}, not {request.method}"
        return error_response(RequestError(says, 405), {"Allow": allowed})

    @app.api_route("/health", methods=_READ)
    async def health() -> Response:
        if failure() is not None:
            return JSONResponse({"status": "failed", "reason": failure()}, 503)
        ready = app.state.ready
        return JSONResponse({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    @app.api_route("/metrics", methods=_READ)
    async def metrics() -> Response:
        content, media_type = metrics_of_server.expose()
        return Response(content, media_type=media_type)

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> Response:
        async def listed() -> Response:
            return JSONResponse({"object": "list", "data": [service.arrivals.card()]})

        return await answered(listed)

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def model(name: str) -> Response:
        async def shown() -> Response:
            service.arrivals.check_model(name)
            return JSONResponse(service.arrivals.card())

        return await answered(shown)

    def post(route: str, handler: Callable[[Request], Awaitable[Response]]) -> None:
        async def handle(request: Request) -> Response:
            return await answered(lambda: handler(request))

        app.post(route)(handle)

    for route, handler in service.routes().items():
        post(route, handler)

    @app.api_route("/", methods=_READ)
    async def page() -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
        policy += " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(read_page(service.page), headers={"Content-Security-Policy": policy})

    return app


class _Below:
    """Serves the routes with and without the prefix, so that a proxy may strip it or not."""

    def __init__(self, app: ASGIApp, root_path: str):
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._root_path}, receive, send)
