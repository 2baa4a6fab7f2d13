"""Continuous batching: requests join and leave a running batch, with the same results as on their own.

One thread owns the device. Between two short decoding bursts it checks the queue: waiting requests take free slots
(their images are encoded, their prompts are run), finished or cancelled requests leave theirs. Common prefixes with
earlier prompts are reused (``inference.batching.batch``).

    with Engine(Magma.from_checkpoint("runs/quickstart")) as engine:
        ticket = engine.submit([ImageInput("cat.png"), "A picture of"])
        for piece in ticket:
            print(piece.text, end="")
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from magma_jax.inference.batching.batch import Entry, Place, SlotBatch
from magma_jax.inference.batching.config import EngineConfig
from magma_jax.inference.batching.requests import (
    Alternatives,
    Progress,
    RequestOptions,
    TextAssembler,
    Ticket,
)
from magma_jax.inference.decoding.decode import SampledTokens, TopTokens
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.pending import EngineError, QueueFull, UnfinishedError
from magma_jax.inference.prompts import Prompt, PromptLayout
from magma_jax.inference.structured.constraints import Constraint
from magma_jax.inference.structured.grammars import Grammar, Grammars, Guide, GuideError

_log = logging.getLogger(__name__)

# While requests wait, a burst ends when this many have finished: running one prompt takes as long as running these.
ENOUGH = 4


class EngineStats(NamedTuple):
    """Counters since the start, and the current state."""

    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    images_encoded: int


@dataclasses.dataclass
class _Work:
    ticket: Ticket
    prompt: PromptLayout
    text: TextAssembler
    grammar: Grammar | None
    guide: Guide | None
    new: int = 0

    @property
    def nbytes(self) -> int:
        images = sum(pixels.nbytes for pixels in self.prompt.pixels.values())
        return images if self.grammar is None else images + self.grammar.nbytes


class _New(NamedTuple):
    """Tokens that a burst sampled for one request."""

    tokens: list[int]
    logprobs: list[float]
    top: list[Alternatives]


class Engine:
    """Runs requests of many callers on one model; thread-safe. Use it in a ``with`` block.

    Attributes:
        context: positions per request.
        buckets: lengths that prompts are padded to.
        failure: reason why the engine has stopped for good; None while it works.

    Raises:
        ValueError: the config's context exceeds the model's.
    """

    def __init__(self, model: TokenGenerator, config: EngineConfig = EngineConfig()):
        self.model, self.config = model, config
        limit = model.lm_config.context_length
        if config.context is not None and config.context > limit:
            raise ValueError(f"a context of {config.context} was asked for, but the model has {limit} positions")
        self.context = config.context or limit
        self.failure: str | None = None
        self._batch = SlotBatch(
            model,
            count=config.slots,
            context=self.context,
            images=config.images,
            steps=config.steps,
            reuse=config.reuse,
        )
        self.buckets = self._batch.buckets
        rows = model.lm_config
        self._grammars = Grammars(model.tokenizer, table_rows=rows.vocab_rows, ids=rows.head_rows)
        self._waiting: collections.deque[_Work] = collections.deque()
        self._running: dict[int, _Work] = {}
        self._changed = threading.Condition()
        self._stopping = self._draining = self._paused = False
        self._finished = self._prompt_tokens = self._reused = self._new = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Stops the engine; with ``drain`` pending requests are finished first, otherwise they fail."""
        with self._changed:
            self._draining = True
            if drain:
                self._changed.wait_for(lambda: not (self._waiting or self._running), timeout)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._grammars.close()

    def compile(self, constraint: Constraint) -> Grammar:
        """Compiles a constraint for ``RequestOptions``; thread-safe, takes a second at most.

        Raises:
            ConstraintError: an unsupported constraint, or one that takes too much time or memory.
        """
        return self._grammars.compile(constraint)

    def layout(self, prompt: Prompt, salt: bytes = b"") -> PromptLayout:
        """The layout of a prompt; thread-safe, for use before ``submit``.

        Prompts with different ``salt`` never share caches, so that timings and token counts reveal nothing about
        other callers' prompts.

        Raises:
            ValueError: an empty prompt, an item that is neither text nor image, too many images, or more text than
                the context can hold. ImageError: a bad image.
        """
        size = sum(len(item) for item in prompt if isinstance(item, str))
        if size > self.context * self.model.tokenizer.longest:  # checked before tokenization, which is slow
            raise ValueError(f"the prompt has {size} characters, more than the context of {self.context} tokens holds")
        salt = salt if self.config.reuse else secrets.token_bytes(16)
        return self.model.layout(prompt, max_images=self.config.images, salt=salt)

    def submit(self, prompt: Prompt | PromptLayout, options: RequestOptions = RequestOptions()) -> Ticket:
        """Queues a request and returns immediately.

        Raises:
            QueueFull: ``queue`` requests are waiting, or their images and grammars take ``queue_bytes``.
            ValueError: prompt and answer exceed the context. Also the errors of ``layout`` and ``compile``.
            EngineError: the engine is shutting down, or has failed.
        """
        layout = prompt if isinstance(prompt, PromptLayout) else self.layout(prompt)
        length = len(layout)
        if length + options.max_new_tokens > self.context:
            raise ValueError(
                f"the prompt has {length} positions and {options.max_new_tokens} new tokens were asked for, but the "
                f"context holds {self.context}; shorten the prompt or lower max_new_tokens"
            )
        grammar = options.constraint
        if isinstance(grammar, Constraint):
            grammar = self.compile(grammar)
        ticket = Ticket(length, options)
        guide = None if grammar is None else grammar.start()
        text = TextAssembler(self.model.tokenizer, options.stop)
        work = _Work(ticket=ticket, prompt=layout, text=text, grammar=grammar, guide=guide)
        with self._changed:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._draining:
                raise EngineError("the engine is shutting down; ask another or try later")
            if len(self._waiting) >= self.config.queue:
                raise QueueFull(f"{self.config.queue} requests are waiting already; try again later")
            held = sum(other.nbytes for other in self._waiting)
            if held and held + work.nbytes > self.config.queue_bytes:
                raise QueueFull("the images of waiting requests take all the room they may; try again later")
            self._waiting.append(work)
            self._changed.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """Counters for monitoring."""
        with self._changed:
            return EngineStats(
                waiting=len(self._waiting),
                running=len(self._running),
                finished=self._finished,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=self._reused,
                new_tokens=self._new,
                images_encoded=self._batch.encoded,
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which no request is admitted: those submitted meanwhile wait and then start together."""
        self._paused = True
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def warmup(self) -> float:
        """Compiles every program now instead of at first use; returns the seconds it took."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._running))
            self._batch.warm_up()
        return time.perf_counter() - started

    # The methods below run in the engine's thread only.

    def _run(self) -> None:
        try:
            self._loop()
            reason = "the engine was shut down"
        except BaseException as error:
            _log.exception("the engine has stopped")
            self.failure = reason = f"the engine has stopped ({type(error).__name__}: {error!s:.300}); restart it"
        self._fail_all(EngineError(reason), waiting=True)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
                if self._stopping:
                    return
                if self._paused and not self._running:
                    self._changed.wait(0.01)  # cancelled requests are dropped meanwhile
            try:
                self._drop_cancelled()
                self._step()
            except Exception as error:  # callers must be told of any device error
                self._fail_all(EngineError(f"generation failed ({type(error).__name__}: {error!s:.300})"))
                self._batch.reset()

    def _step(self) -> None:
        """Admits waiting requests and decodes a burst.

        All programs are dispatched before any result is awaited, unless an answer is constrained: its second mask
        depends on the first token.
        """
        admitted = self._admit_waiting()
        if any(work.guide is not None for work in self._running.values()):
            self._deliver_first(admitted)
            admitted = []
        running = dict(self._running)
        if not running:
            return
        guides = {slot: work.guide for slot, work in running.items() if work.guide is not None}
        top = any(work.ticket.options.top_logprobs for work in running.values())
        enough = min(ENOUGH, len(self._waiting)) or None
        burst, counts = self._batch.decode(top=top, enough=enough, guides=guides or None)
        self._deliver_first(admitted)
        works = [(slot, running.get(slot)) for slot in range(self.config.slots)]
        self._deliver_sampled(works, burst, np.asarray(counts).tolist())

    def _deliver_first(self, admitted: list[tuple[list[Entry], SampledTokens]]) -> None:
        for group, first in admitted:
            works = [(entry.place.slot, self._running[entry.place.slot]) for entry in group]
            self._deliver_sampled(works, _as_column(first), [1] * len(works))

    def _fail_all(self, error: EngineError, *, waiting: bool = False) -> None:
        with self._changed:
            lost = list(self._running.values())
            self._running.clear()
            if waiting:
                lost += self._waiting
                self._waiting.clear()
            self._changed.notify_all()
        for work in lost:
            work.ticket.fail(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [work for work in self._waiting if work.ticket.cancelled]
            for work in gone:
                self._waiting.remove(work)
            self._changed.notify_all()  # a draining ``close`` may wait for these only
            left = [slot for slot, work in self._running.items() if work.ticket.cancelled]
        for work in gone:
            self._finished += 1
            work.ticket.put(Progress("", finish="cancelled"))
        for slot in left:
            self._end(slot, Progress("", finish="cancelled"))
        if left:
            self._batch.release(left)

    def _admit_waiting(self) -> list[tuple[list[Entry], SampledTokens]]:
        """Assigns each free slot to a waiting request at most once, so that running requests get to decode."""
        admitted: list[tuple[list[Entry], SampledTokens]] = []
        placed: list[Entry] = []
        free = set(range(self.config.slots)) - self._running.keys()
        while free and self._waiting and not self._paused:
            work = self._waiting[0]
            place = self._batch.place(work.prompt, free, placed)
            if place is None:
                admitted += self._batch.admit(placed)
                placed = []
                continue
            free.remove(place.slot)
            with self._changed:
                self._waiting.popleft()
                self._running[place.slot] = work
            placed.append(Entry(place, work.prompt, work.ticket.options, work.guide))
            self._count_prompt(work, place)
        return admitted + self._batch.admit(placed)

    def _count_prompt(self, work: _Work, place: Place) -> None:
        work.ticket.reused_tokens = place.start
        self._prompt_tokens += work.ticket.prompt_tokens
        self._reused += place.start

    def _deliver_sampled(
        self, works: Sequence[tuple[int, _Work | None]], sampled: SampledTokens, counts: Sequence[int]
    ) -> None:
        """Delivers sampled tokens, ``counts`` per row, to the requests that have not ended since."""
        token, logprob, top = jax.device_get((sampled.token, sampled.logprob, sampled.top))
        stopped = []
        for row, ((slot, work), count) in enumerate(zip(works, counts, strict=True)):
            if not count or work is None or self._running.get(slot) is not work:
                continue
            size = work.ticket.options.top_logprobs
            alternatives = [_alternatives(top, size, (row, step)) for step in range(count)] if size else []
            new = _New(token[row, :count].tolist(), logprob[row, :count].tolist(), alternatives)
            stopped += self._deliver(slot, work, new)
        if stopped:
            self._batch.release(stopped)

    def _deliver(self, slot: int, work: _Work, new: _New) -> list[int]:
        """Delivers new tokens to a request and ends it if finished; returns its slot if the device must release it."""
        ends = self.model.tokenizer.end_ids
        tokens = list(itertools.takewhile(lambda token: token not in ends, new.tokens))
        ended = len(tokens) < len(new.tokens)
        work.new += len(tokens)
        self._new += len(tokens)
        complete = False
        if work.guide is not None and not ended:
            try:
                work.guide.advance(tokens)
            except GuideError as error:
                self._lose(slot, UnfinishedError(str(error)))
                return [slot]
            complete = work.guide.complete
        at_limit = work.new >= work.ticket.options.max_new_tokens
        text, found = work.text.add(tokens, last=ended or at_limit or complete)
        if work.guide is not None:
            text = work.guide.shown(text)
        self._batch.add_tokens(slot, tokens)
        finish = "stop" if ended or complete or found is not None else "length" if at_limit else None
        used = len(tokens) if found is None else found
        piece = Progress(
            text=text,
            tokens=tuple(tokens[:used]),
            logprobs=tuple(new.logprobs[:used]),
            top=tuple(new.top[:used]),
            finish=finish,
        )
        if finish is None:
            work.ticket.put(piece)
        else:
            self._end(slot, piece)
        return [slot] if complete or found is not None else []

    def _end(self, slot: int, last: Progress) -> None:
        self._leave(slot).ticket.put(last)

    def _lose(self, slot: int, error: EngineError) -> None:
        self._leave(slot).ticket.fail(error)

    def _leave(self, slot: int) -> _Work:
        self._batch.end(slot)
        with self._changed:
            work = self._running.pop(slot)
            self._finished += 1
            self._changed.notify_all()
        return work


def _as_column(sampled: SampledTokens) -> SampledTokens:
    """Tokens of one step, in the shape of a one-step burst."""
    return jax.tree.map(lambda array: np.asarray(array)[:, None], sampled._replace(logits=None))


def _alternatives(top: TopTokens, count: int, where: tuple[int, int]) -> Alternatives:
    tokens, logprobs = (array[where][:count].tolist() for array in top)
    return tuple(zip(tokens, logprobs, strict=True))
