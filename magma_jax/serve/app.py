"""The web application: OpenAI's routes, health, metrics and the page, over one engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from magma_jax.inference.engine import Engine
from magma_jax.serve.attention import warm_up as attention_warm_up
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError, error_response
from magma_jax.serve.guard import Guard
from magma_jax.serve.service import Service


def create_app(engine: Engine, config: ServerConfig = ServerConfig()) -> FastAPI:
    """The application; the engine is warmed up when it starts and drained when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.warmup)
        await asyncio.to_thread(attention_warm_up, engine)
        app.state.ready = True
        yield
        app.state.ready = False
        # Requests have ended or were given up: what the engine has left is what it does just now.
        await asyncio.to_thread(engine.close, drain=True, timeout=1.0)
        service.close()

    app = FastAPI(title="magma_jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.ready = False
    service = Service(engine, config)
    app.add_middleware(Guard, config=config, metrics=service.metrics)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nothing_here(request: Request, _: Exception) -> Response:
        return error_response(RequestError(f"nothing at {request.method} {request.url.path[:80]}", 404))

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        ready = app.state.ready
        return JSONResponse({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content, media_type = service.metrics.expose()
        return Response(content, media_type=media_type)

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"id": config.model, "object": "model", "created": service.created, "owned_by": "magma_jax"}
        return JSONResponse({"object": "list", "data": [entry]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            return await service.chat(request)
        except RequestError as error:
            return error_response(error)

    @app.post("/v1/attention")
    async def looking(request: Request) -> Response:
        try:
            return await service.attention(request)
        except RequestError as error:
            return error_response(error)

    @app.get("/")
    async def page() -> Response:
        text = (resources.files("magma_jax.serve") / "page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
        policy += " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    return app
