"""What the routes do: a request becomes a prompt, the prompt tickets of the engine, and these an answer."""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from magma_jax.data.images import ImageError
from magma_jax.inference.engine import Encoded, Engine, QueueFull
from magma_jax.inference.requests import EngineError, Progress, RequestOptions, Ticket
from magma_jax.serve import completions
from magma_jax.serve.attention import AttentionRequest, attention
from magma_jax.serve.body import read_body
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import QUEUE_FULL, RequestError, busy, error_body
from magma_jax.serve.fetch import FetchError
from magma_jax.serve.metrics import ServerMetrics
from magma_jax.serve.pictures import RequestPicture
from magma_jax.serve.schema import ChatRequest, ImageURL, PromptRequest

# What an answer that names no limit gets at most.
DEFAULT_TOKENS = 64
# Requests for attention at a time, those included that wait.
MAX_LOOKING = 8

T = TypeVar("T")


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine, self.config = engine, config
        self.created = int(time.time())
        self.metrics = ServerMetrics(engine.stats)
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
            wanted = await read_body(request, ChatRequest, self.config, hold)
            encoded = await self._encode(wanted, started)
            wanted.messages.clear()  # they may be large, and the answer may take long
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
                raise busy("arriving requests hold all the memory they may")
            held += size
            self._held_bytes += size

        if self._arriving + self.engine.stats().waiting >= self.engine.config.queue:
            raise busy("too many requests are arriving or waiting")
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

    async def attention(self, request: Request) -> Response:
        started = time.perf_counter()
        with self._arrival() as hold:
            wanted = await read_body(request, AttentionRequest, self.config, hold)
            encoded = await self._encode(wanted, started)
            wanted.messages.clear()
        if self._looking >= MAX_LOOKING:
            raise busy("too many requests for attention are waiting")
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
            prompt = [item if isinstance(item, str) else RequestPicture(item.url, rules) for item in items]
            return self.engine.encode(prompt, (wanted.cache_salt or "").encode())

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
        choices, tokenizer = [], self.engine.model.tokenizer
        for index, ticket in enumerate(tickets):
            pieces = ticket.pieces()
            message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
            choice = {"index": index, "message": message, "finish_reason": pieces[-1].finish}
            if wanted.return_token_ids:
                choice["token_ids"] = ticket.tokens
            choices.append(choice | {"logprobs": completions.logprobs(tokenizer, pieces) if wanted.logprobs else None})
        head = completions.head("chat.completion", self.config.model)
        return JSONResponse(head | {"choices": choices, "usage": completions.usage(tickets)})

    async def _stream(self, wanted: ChatRequest, tickets: list[Ticket], started: float) -> AsyncIterator[str]:
        head = completions.head("chat.completion.chunk", self.config.model)
        tokenizer = self.engine.model.tokenizer

        def event(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None} | more
            return f"data: {json.dumps(head | {'choices': [choice]}, ensure_ascii=False)}\n\n"

        try:
            for index in range(len(tickets)):
                yield event(index, {"role": "assistant", "content": ""})
            async for index, piece in self._progress(tickets, started):
                more = {"logprobs": completions.logprobs(tokenizer, [piece])} if wanted.logprobs else {}
                if wanted.return_token_ids:
                    more["token_ids"] = piece.tokens
                yield event(index, {"content": piece.text} if piece.text else {}, piece.finish, **more)
            if wanted.stream_options is not None and wanted.stream_options.include_usage:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': completions.usage(tickets)})}\n\n"
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
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


def _cancel(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
