"""Replies: converts engine tickets to a response, complete or as an event stream."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from magma_jax.inference.batching.requests import Progress, Ticket
from magma_jax.inference.pending import AnyPiece, EngineError, Pending, UnfinishedError
from magma_jax.serve.arrivals import too_late
from magma_jax.serve.completions import Shape, head, usage
from magma_jax.serve.errors import RequestError, error_body
from magma_jax.serve.prometheus import ServerMetrics
from magma_jax.serve.requests.schema import StreamOptions


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answers being sampled.

    Attributes:
        shape: response format.
        model: name of the model.
        answers: tickets of the answers to each prompt.
        metrics: metrics that record the latency.
        started: arrival of the request, by ``time.perf_counter``.
        timeout: seconds for the request.
        stream: whether to stream events.
        count: whether stream events include token usage.
        token_ids: whether to return token ids.
        strip: whether to remove leading whitespace.
    """

    shape: Shape
    model: str
    answers: list[list[Ticket]]
    metrics: ServerMetrics
    started: float
    timeout: float
    stream: bool = False
    count: StreamOptions = StreamOptions()
    token_ids: bool = False
    strip: bool = False

    async def response(self, request: Request) -> Response:
        """Response to ``request``; sampling is cancelled if the client disconnects.

        Raises:
            RequestError: timeout, or the engine failed; only for a complete response.
        """
        if self.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)
        leaver = asyncio.create_task(left(request))
        try:
            async for _ in self._progress(stop=leaver):
                pass
        finally:
            leaver.cancel()
            cancel(self.answers)
        if leaver.done() and not leaver.cancelled():
            return Response(status_code=499)
        choices = []
        for index, ticket in enumerate(self._tickets):
            pieces = ticket.pieces()
            text = "".join(piece.text for piece in pieces)
            choice = self.shape.choice(index, pieces, text.lstrip() if self.strip else text)
            choices.append(choice | ({"token_ids": ticket.tokens} if self.token_ids else {}))
        answer = head(self.shape, self.shape.whole, self.model)
        return JSONResponse(answer | {"choices": choices, "usage": usage(self.answers)})

    async def _events(self) -> AsyncIterator[str]:
        begin = head(self.shape, self.shape.chunk, self.model)

        def event(choices: list[dict[str, Any]], *, last: bool = False) -> str:
            used = {}
            if last or self.count.continuous_usage_stats:
                used = {"usage": usage(self.answers)}
            elif self.count.include_usage:
                used = {"usage": None}
            return f"data: {json.dumps(begin | {'choices': choices} | used, ensure_ascii=False)}\n\n"

        # Whether a choice has sent anything but whitespace.
        begun = [not self.strip] * len(self._tickets)
        try:
            for index in range(len(self._tickets)):
                if (opening := self.shape.opening(index)) is not None:
                    yield event([opening])
            async for index, piece in self._progress():
                text = piece.text if begun[index] else piece.text.lstrip()
                begun[index] = begun[index] or bool(text)
                choice = self.shape.piece(index, piece, text)
                yield event([choice | ({"token_ids": piece.tokens} if self.token_ids else {})])
            if self.count.include_usage:
                yield event([], last=True)
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
        finally:
            # Also reached when the client disconnects, which closes the generator.
            cancel(self.answers)

    @property
    def _tickets(self) -> list[Ticket]:
        return [ticket for tickets in self.answers for ticket in tickets]

    async def _progress(self, stop: asyncio.Task | None = None) -> AsyncIterator[tuple[int, Progress]]:
        """``follow`` of all tickets, with the times to the first token and to the end recorded."""
        first = True
        async for index, piece in follow(self._tickets, self.started, self.timeout, stop):
            if first:
                first = False
                self.metrics.first_token.observe(time.perf_counter() - self.started)
            yield index, piece
        if not (stop is not None and stop.done()):
            self.metrics.duration.observe(time.perf_counter() - self.started)


async def follow(
    tickets: Sequence[Pending[AnyPiece]], started: float, timeout: float, stop: asyncio.Task | None = None
) -> AsyncIterator[tuple[int, AnyPiece]]:
    """Yields index and piece of all tickets as they arrive, until all have ended or ``stop`` is done.

    Args:
        tickets: accepted requests.
        started: arrival of the request, by ``time.perf_counter``.
        timeout: seconds for the request.
        stop: task that ends the wait.

    Raises:
        RequestError: timeout, or the engine failed.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    for ticket in tickets:
        ticket.on_progress(lambda: loop.call_soon_threadsafe(news.set))
    if stop is not None:
        stop.add_done_callback(lambda _: news.set())
    seen, running = [0] * len(tickets), set(range(len(tickets)))
    while running and not (stop is not None and stop.done()):
        try:
            await asyncio.wait_for(news.wait(), max(started + timeout - time.perf_counter(), 0))
        except TimeoutError:
            raise too_late(timeout) from None
        news.clear()
        for index in sorted(running):
            try:
                pieces = tickets[index].pieces(seen[index])
            except EngineError as error:
                raise RequestError(str(error), 400 if isinstance(error, UnfinishedError) else 500) from None
            for piece in pieces:
                seen[index] += 1
                yield index, piece
                if piece.finish is not None:
                    running.discard(index)


def cancel(answers: Sequence[Sequence[Pending]]) -> None:
    """Cancels all unfinished tickets."""
    for tickets in answers:
        for ticket in tickets:
            ticket.cancel()


async def left(request: Request) -> None:
    """Returns when the client disconnects."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
