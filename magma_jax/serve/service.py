"""Request handling: from a request to a prompt, from the prompt to engine tickets, from tickets to a response."""

import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from magma_jax.data.decoders import DecoderBusy, DecoderError
from magma_jax.data.images import ImageError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.batching.engine import Engine, EngineStats
from magma_jax.inference.batching.requests import Ticket
from magma_jax.inference.pending import EngineError, QueueFull
from magma_jax.inference.prompts import PromptLayout, lay_out_tokens
from magma_jax.inference.structured.grammars import Grammar
from magma_jax.serve.arrivals import Arrivals
from magma_jax.serve.attention_route import AttentionRequest, attention
from magma_jax.serve.attention_route import warm_up as attention_warm_up
from magma_jax.serve.completions import ChatShape, Shape, TextShape
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import QUEUE_FULL, RequestError, busy
from magma_jax.serve.network.body import read_body
from magma_jax.serve.prometheus import ServerMetrics
from magma_jax.serve.prompts.fetch import FetchError
from magma_jax.serve.prompts.images import RequestImage, decoders_of
from magma_jax.serve.reply import Reply, cancel
from magma_jax.serve.requests.schema import (
    ChatRequest,
    ImageURL,
    Items,
    MessagesRequest,
    PromptRequest,
    SamplingRequest,
    TextRequest,
)

# Maximum number of attention requests, waiting ones included.
MAX_LOOKING = 8


class Service:
    """Shared state and handlers of the text routes."""

    page, counters = "ask.html", EngineStats._fields

    def __init__(self, engine: Engine, config: ServerConfig, metrics: ServerMetrics):
        self.engine, self.config, self.metrics = engine, config, metrics
        self.arrivals = Arrivals(config, engine.config.queue, lambda: engine.stats().waiting)
        self._decoders = decoders_of(config.images, config.decoders, engine.config.queue)
        # Separate pools: text prompts do not wait for images, each of which blocks a thread on downloads and decoding.
        self._texts = ThreadPoolExecutor(2, "texts")
        self._images = ThreadPoolExecutor(engine.config.queue, "images")
        # One at a time, since the engine has priority on the device.
        self._looker = ThreadPoolExecutor(1, "attention")
        self._compilers = ThreadPoolExecutor(1, "grammars")  # separate, so that images do not wait for grammars
        self._looking = 0

    def routes(self) -> dict[str, Callable[[Request], Awaitable[Response]]]:
        """Handlers by route."""
        return {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/attention": self.attention,
        }

    def warm_up(self) -> None:
        """Compiles every program."""
        self.engine.warmup()
        attention_warm_up(self.engine)

    def start(self) -> None:
        """Starts the decoders before the first request."""
        self._decoders.start()

    def close(self) -> None:
        """Ends the threads and the decoders; waiting requests fail."""
        self._decoders.close()
        for threads in (self._texts, self._images, self._looker, self._compilers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: Request) -> Response:
        """Handles a chat completion."""
        return await (await self._begin_chat(request)).response(request)

    async def complete(self, request: Request) -> Response:
        """Handles a text completion with one or several prompts."""
        return await (await self._begin_text(request)).response(request)

    # Separate functions, so that bodies and prompts are freed while an answer is sampled.

    async def _begin_chat(self, request: Request) -> Reply:
        started = time.perf_counter()
        with self.arrivals.arrival() as hold:
            wanted = await read_body(request, ChatRequest, self.config, hold)
            self.arrivals.check_model(wanted.model)
            grammar = await self._grammar(wanted, started)
            layouts = await self._layouts([await self._items(wanted, started)], wanted, started, "messages")
            tickets = self._submit(layouts, wanted, grammar)
        shape = ChatShape(self.engine.model.tokenizer, logprobs=wanted.logprobs)
        # With a template the space before an answer belongs to the template. A grammar determines how its answer
        # begins.
        strip = not self.config.templates.is_raw(wanted) and grammar is None
        return self._reply(wanted, shape, tickets, started, strip=strip)

    async def _begin_text(self, request: Request) -> Reply:
        started = time.perf_counter()
        with self.arrivals.arrival() as hold:
            wanted = await read_body(request, TextRequest, self.config, hold)
            self.arrivals.check_model(wanted.model)
            grammar = await self._grammar(wanted, started)
            layouts = await self._layouts(wanted.prompts, wanted, started, "prompt")
            tickets = self._submit(layouts, wanted, grammar)
        tokenizer, echo = self.engine.model.tokenizer, None
        if wanted.echo:
            echo = [_spelled(prompt, tokenizer) for prompt in wanted.prompts for _ in range(wanted.n)]
        shape = TextShape(tokenizer, logprobs=wanted.logprobs is not None, echo=echo)
        return self._reply(wanted, shape, tickets, started)

    def _reply(
        self,
        wanted: SamplingRequest,
        shape: Shape,
        tickets: list[list[Ticket]],
        started: float,
        *,
        strip: bool = False,
    ) -> Reply:
        return Reply(
            shape=shape,
            model=self.config.model,
            answers=tickets,
            metrics=self.metrics,
            started=started,
            timeout=self.config.timeout,
            stream=wanted.stream,
            count=wanted.stream_options,
            token_ids=wanted.return_token_ids,
            strip=strip,
        )

    async def attention(self, request: Request) -> Response:
        started = time.perf_counter()
        with self.arrivals.arrival() as hold:
            wanted = await read_body(request, AttentionRequest, self.config, hold)
            self.arrivals.check_model(wanted.model)
            (layout,) = await self._layouts([await self._items(wanted, started)], wanted, started, "messages")
            wanted.messages.clear()  # frees large messages while the request waits
        if self._looking >= MAX_LOOKING:
            raise busy("too many requests for attention are waiting")
        self._looking += 1
        try:
            work = functools.partial(attention, self.engine, layout, wanted)
            return JSONResponse(await self.arrivals.in_thread(self._looker, work, started))
        finally:
            self._looking -= 1

    async def _items(self, wanted: MessagesRequest, started: float) -> Items:
        """Applies the template to the messages, in a thread, since texts may have megabytes."""
        return await self.arrivals.in_thread(self._texts, lambda: self.config.templates.items(wanted), started)

    async def _layouts(
        self, prompts: list[list[str | ImageURL] | list[int]], wanted: PromptRequest, started: float, param: str
    ) -> list[PromptLayout]:
        """Layouts of prompts of texts and images, which are fetched and decoded, or of token ids."""
        rules, salt = self.config.images, (wanted.cache_salt or "").encode()
        images = sum(isinstance(item, ImageURL) for items in prompts for item in items)
        if images > rules.max_images:
            says = f"the request has {images} images, at most {rules.max_images} are taken"
            raise RequestError(says, param=param)

        deadline = time.monotonic() + started + self.config.timeout - time.perf_counter()

        def lay_out(items: Any) -> PromptLayout:
            if items and isinstance(items[0], int):
                return lay_out_tokens(items, self.engine.model.lm_config.vocab_rows, salt)
            opened = (rules, self._decoders, deadline)
            prompt = [item if isinstance(item, str) else RequestImage(item.url, *opened) for item in items]
            return self.engine.layout(prompt, salt)

        try:
            threads = self._images if images else self._texts
            return await self.arrivals.in_thread(threads, lambda: [lay_out(items) for items in prompts], started)
        except RequestError:
            raise
        except DecoderBusy as error:
            raise busy(str(error)) from None
        except DecoderError as error:
            raise RequestError(str(error), 503) from None
        except (ImageError, FetchError, ValueError) as error:
            raise RequestError(str(error), param=param) from None

    async def _grammar(self, wanted: SamplingRequest, started: float) -> Grammar | None:
        """Compiled grammar of a request's answers; None without a constraint."""
        if not wanted.forms:
            return None
        return await self.arrivals.in_thread(self._compilers, functools.partial(wanted.grammar, self.engine), started)

    def _submit(
        self, prompts: list[PromptLayout], wanted: SamplingRequest, grammar: Grammar | None
    ) -> list[list[Ticket]]:
        """Submits all answers to all prompts; returns their tickets by prompt."""
        cut, context = self.config.cut_max_tokens, self.engine.context
        options = [wanted.options(context - len(prompt), cut=cut, grammar=grammar) for prompt in prompts]
        tickets: list[list[Ticket]] = [[] for _ in prompts]
        try:
            for of_one, prompt, several in zip(tickets, prompts, options, strict=True):
                for one in several:
                    with _told_to_clients():
                        of_one.append(self.engine.submit(prompt, one))
        except RequestError:
            cancel(tickets)
            raise
        return tickets


@contextlib.contextmanager
def _told_to_clients() -> Iterator[None]:
    """Converts the engine's exceptions to RequestErrors."""
    try:
        yield
    except QueueFull as error:
        raise RequestError(str(error), 429, code=QUEUE_FULL) from None
    except EngineError as error:
        raise RequestError(str(error), 503) from None
    except ValueError as error:
        raise RequestError(str(error), param="max_tokens", code="context_length_exceeded") from None


def _spelled(prompt: Any, tokenizer: Tokenizer) -> str:
    """Text of a prompt without its images."""
    if isinstance(prompt[0], int):
        return tokenizer.decode(prompt)
    return "".join(item for item in prompt if isinstance(item, str))
