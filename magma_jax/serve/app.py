"""The web application: OpenAI's routes, health, metrics and the page, over one engine."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magma_jax.data.images import ImageError
from magma_jax.inference.engine import Encoded, Engine, QueueFull
from magma_jax.inference.requests import EngineError, Progress, RequestOptions, Ticket
from magma_jax.serve.attention import AttentionRequest, attention
from magma_jax.serve.attention import warm_up as attention_warm_up
from magma_jax.serve.fetch import FetchError
from magma_jax.serve.metrics import ServerMetrics
from magma_jax.serve.pictures import PictureRules, RequestPicture
from magma_jax.serve.schema import Asked, ChatRequest, ImageURL, PromptRequest, RequestError, finite, parse, probability

# What an answer that names no limit gets at most.
DEFAULT_TOKENS = 64
# Requests for attention at a time, those included that wait.
MAX_LOOKING = 8

# Code of the errors that mean: try again later.
QUEUE_FULL = "queue_full"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server behaves.

    Attributes:
        model: the name that requests call the model by.
        api_key: asked for on every route, as a bearer token or as the password of basic authentication; None for none.
        max_body_bytes: of a request.
        timeout: seconds that a request may take, waiting included.
        body_timeout: seconds that it may take to arrive.
        max_held_bytes: of the bodies of requests together, from their arrival until their pictures are decoded.
        decoders: pictures that are decoded at the same time.
        pictures: what pictures are taken.
    """

    model: str = "magma"
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20
    timeout: float = 120.0
    body_timeout: float = 20.0
    max_held_bytes: int = 256 * 2**20
    decoders: int = 2
    pictures: PictureRules = PictureRules()


def create_app(engine: Engine, config: ServerConfig = ServerConfig()) -> FastAPI:
    """The application; the engine is warmed up when it starts and drained when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.warmup)
        await asyncio.to_thread(attention_warm_up, engine)
        app.state.ready = True
        yield
        app.state.ready = False
        await asyncio.to_thread(engine.close, drain=True, timeout=config.timeout)
        service.close()

    app = FastAPI(title="magma_jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.ready = False
    service = _Service(engine, config)
    app.add_middleware(_Guard, key=config.api_key, metrics=service.metrics)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nothing_here(request: Request, _: Exception) -> Response:
        return _error(RequestError(f"nothing at {request.method} {request.url.path[:80]}", 404))

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        ready = app.state.ready
        return JSONResponse({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content, media_type = service.metrics.expose(engine.stats())
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
            return _error(error)

    @app.post("/v1/attention")
    async def looking(request: Request) -> Response:
        try:
            return await service.attention(request)
        except RequestError as error:
            return _error(error)

    @app.get("/")
    async def page() -> Response:
        text = (resources.files("magma_jax.serve") / "page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
        policy += " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    return app


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine, self.config = engine, config
        self.created = int(time.time())
        self.metrics = ServerMetrics()
        self._decoders = ThreadPoolExecutor(config.decoders, "decoder")
        # One at a time beside the engine, which has the device's time first of all.
        self._looker = ThreadPoolExecutor(1, "attention")
        self._looking = self._arriving = self._held_bytes = 0

    def close(self) -> None:
        """Ends the threads; who still waits for one is told."""
        for threads in (self._decoders, self._looker):
            threads.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: Request) -> Response:
        started = time.perf_counter()
        with self._arrival() as hold:
            wanted = await self._read(request, ChatRequest, hold)
            encoded = await self._encode(wanted, started)
            tickets = self._submit(encoded, wanted.options(self._default_tokens(encoded)))
        if wanted.stream:
            body = self._stream(wanted, tickets, started)
            return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(request, wanted, tickets, started)

    @contextlib.contextmanager
    def _arrival(self) -> Iterator[Callable[[int], None]]:
        """A request on its way to the engine's queue, which counts like one in the queue; called with bytes it holds.

        Raises:
            RequestError: too many are on their way or waiting, or they hold too much.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held_bytes and self._held_bytes + size > self.config.max_held_bytes:
                raise _busy("arriving requests hold all the memory they may")
            held += size
            self._held_bytes += size

        if self._arriving + self.engine.stats().waiting >= self.engine.config.queue:
            raise _busy("too many requests are arriving or waiting")
        self._arriving += 1
        try:
            yield hold
        finally:
            self._arriving -= 1
            self._held_bytes -= held

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T], started: float) -> T:
        """Result of ``work``; a thread that takes longer than the request may keeps its place until it is done."""
        left = started + self.config.timeout - time.perf_counter()
        try:
            async with asyncio.timeout(max(left, 0)):
                return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TimeoutError:
            raise self._too_late() from None

    def _too_late(self) -> RequestError:
        return RequestError(f"not done within {self.config.timeout:g} s", 504, code="timeout")

    async def _read(self, request: Request, kind: type[Asked], hold: Callable[[int], None]) -> Asked:
        """The checked body of a request."""
        body, limit, seconds = bytearray(), self.config.max_body_bytes, self.config.body_timeout
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

    async def attention(self, request: Request) -> Response:
        started = time.perf_counter()
        with self._arrival() as hold:
            wanted = await self._read(request, AttentionRequest, hold)
            encoded = await self._encode(wanted, started)
        if self._looking >= MAX_LOOKING:
            raise _busy("too many requests for attention are waiting")
        self._looking += 1
        try:
            work = functools.partial(attention, self.engine, encoded, wanted)
            return JSONResponse(await self._in_thread(self._looker, work, started))
        finally:
            self._looking -= 1

    async def _encode(self, wanted: PromptRequest, started: float) -> Encoded:
        """The prompt of a request, its pictures fetched and decoded."""
        if wanted.model not in (None, self.config.model):
            raise RequestError(f"the model here is {self.config.model!r}", 404, "model", "model_not_found")
        items, limit = wanted.items(), self.config.pictures.max_pictures
        pictures = sum(isinstance(item, ImageURL) for item in items)
        if pictures > limit:
            raise RequestError(f"the request has {pictures} pictures, at most {limit} are taken", param="messages")

        def work() -> Encoded:
            rules = self.config.pictures
            return self.engine.encode(
                [item if isinstance(item, str) else RequestPicture(item.url, rules) for item in items]
            )

        try:
            return await self._in_thread(self._decoders, work, started)
        except RequestError:
            raise
        except (ImageError, FetchError, ValueError) as error:
            raise RequestError(str(error), param="messages") from None

    def _default_tokens(self, encoded: Encoded) -> int:
        return max(1, min(DEFAULT_TOKENS, self.engine.context - len(encoded.tokens)))

    def _submit(self, encoded: Encoded, options: list[RequestOptions]) -> list[Ticket]:
        tickets: list[Ticket] = []
        try:
            for one in options:
                tickets.append(self.engine.submit(encoded, one))
        except QueueFull as error:
            _cancel(tickets)
            raise RequestError(str(error), 429, code=QUEUE_FULL) from None
        except EngineError as error:
            _cancel(tickets)
            raise RequestError(str(error), 503) from None
        except ValueError as error:
            _cancel(tickets)
            raise RequestError(str(error), param="max_tokens", code="context_length_exceeded") from None
        return tickets

    async def _whole(self, request: Request, wanted: ChatRequest, tickets: list[Ticket], started: float) -> Response:
        leaver = asyncio.create_task(_left(request))
        try:
            async for _ in self._progress(tickets, started, stop=leaver):
                pass
        finally:
            leaver.cancel()
            _cancel(tickets)
        if leaver.done() and not leaver.cancelled():
            return Response(status_code=499)
        choices = []
        for index, ticket in enumerate(tickets):
            pieces = ticket.pieces()
            message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
            choice = {"index": index, "message": message, "finish_reason": pieces[-1].finish}
            if wanted.return_token_ids:
                choice["token_ids"] = ticket.tokens
            choices.append(choice | {"logprobs": self._logprobs(pieces) if wanted.logprobs else None})
        head = self._head("chat.completion")
        return JSONResponse(head | {"choices": choices, "usage": _usage(tickets)})

    async def _stream(self, wanted: ChatRequest, tickets: list[Ticket], started: float) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")

        def event(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None} | more
            return f"data: {json.dumps(head | {'choices': [choice]}, ensure_ascii=False)}\n\n"

        try:
            for index in range(len(tickets)):
                yield event(index, {"role": "assistant", "content": ""})
            async for index, piece in self._progress(tickets, started):
                more = {"logprobs": self._logprobs([piece])} if wanted.logprobs else {}
                if wanted.return_token_ids:
                    more["token_ids"] = piece.tokens
                yield event(index, {"content": piece.text} if piece.text else {}, piece.finish, **more)
            if wanted.stream_options is not None and wanted.stream_options.include_usage:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(tickets)})}\n\n"
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(_body(error))}\n\n"
        finally:
            # Also when the client leaves: the generator is closed, and nobody wants the rest.
            _cancel(tickets)

    async def _progress(
        self, tickets: list[Ticket], started: float, stop: asyncio.Task | None = None
    ) -> AsyncIterator[tuple[int, Progress]]:
        """Index and piece of all tickets as they come, until all have ended or ``stop`` is done.

        Raises:
            RequestError: too slow, or the engine failed.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        for ticket in tickets:
            ticket.on_progress(lambda: loop.call_soon_threadsafe(news.set))
        if stop is not None:
            stop.add_done_callback(lambda _: news.set())
        seen, running, first = [0] * len(tickets), set(range(len(tickets))), True
        while running and not (stop is not None and stop.done()):
            left = started + self.config.timeout - time.perf_counter()
            try:
                await asyncio.wait_for(news.wait(), max(left, 0))
            except TimeoutError:
                raise self._too_late() from None
            news.clear()
            for index in sorted(running):
                try:
                    pieces = tickets[index].pieces(seen[index])
                except EngineError as error:
                    raise RequestError(str(error), 500) from None
                for piece in pieces:
                    if first:
                        first = False
                        self.metrics.first_token.observe(time.perf_counter() - started)
                    seen[index] += 1
                    yield index, piece
                    if piece.finish is not None:
                        running.discard(index)
        if not running:
            self.metrics.duration.observe(time.perf_counter() - started)

    def _logprobs(self, pieces: list[Progress]) -> dict[str, Any]:
        tokenizer = self.engine.model.tokenizer

        def entry(token: int, logprob: float) -> dict[str, Any]:
            # A token may be part of a character: the bytes of several join to what their texts cannot show.
            spelled = list(tokenizer.token_bytes(token))
            return {"token": tokenizer.decode([token]), "logprob": probability(logprob), "bytes": spelled}

        entries = []
        for piece in pieces:
            tops = piece.top or [()] * len(piece.tokens)
            for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True):
                entries.append(entry(token, logprob) | {"top_logprobs": [entry(*other) for other in top]})
        return {"content": entries, "refusal": None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.config.model,
        }


def _usage(tickets: list[Ticket]) -> dict[str, Any]:
    prompt, new = tickets[0].prompt_tokens, sum(len(ticket.tokens) for ticket in tickets)
    cached = {"cached_tokens": tickets[0].reused_tokens}
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return usage | {"prompt_tokens_details": cached}


def _cancel(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def _busy(what: str) -> RequestError:
    return RequestError(f"{what}; try again later", 429, code=QUEUE_FULL)


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


class _Guard:
    """Asks for the key, counts, and adds headers, without standing between a stream and its client."""

    def __init__(self, app: ASGIApp, key: str | None, metrics: ServerMetrics):
        self._app, self._key, self._metrics = app, key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(scope["path"], message["status"])
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        app = self._app
        if self._key is not None and not _authorized(dict(scope["headers"]).get(b"authorization", b""), self._key):
            app = _error(RequestError("wrong or missing API key", 401, code="invalid_api_key"))
            # A browser then asks for the key, as a password.
            app.headers["WWW-Authenticate"] = 'Basic realm="magma_jax", charset="UTF-8"'
        await app(scope, receive, watched)


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


def _body(error: RequestError) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _error(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(_body(error), error.status, headers=headers)
