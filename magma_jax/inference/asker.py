"""Answers of autoregressive text models: by sampling, beam search, or choice."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from magma_jax.inference.answers import Answer, AnswerOptions
from magma_jax.inference.batching.config import EngineConfig
from magma_jax.inference.batching.engine import Engine
from magma_jax.inference.batching.requests import RequestOptions, Ticket
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import Prompt
from magma_jax.inference.search.beam import beam_search
from magma_jax.inference.search.choice import rank, score

T = TypeVar("T")

# Prompts that are submitted before the first answer is awaited.
AHEAD = 17


class Asker:
    """Answers prompts with the same options; use it in a ``with`` block.

    Args:
        model: any autoregressive text model.
        options: options of the answers.
        first: a prompt that sets the context size; longer prompts are rejected.
        prompts: number of prompts.
    """

    def __init__(self, model: TokenGenerator, options: AnswerOptions, first: Prompt, prompts: int = 1):
        self.model, self.options = model, options
        self._engine: Engine | None = None
        if not (options.beams or options.choices):
            layout = model.layout(first)
            room = min(SEQUENCES.fit(len(layout) + options.max_new_tokens), model.lm_config.context_length)
            slots = min(8, prompts * options.n)
            images = max(len(layout.pixels), 1) * min(8, prompts)
            queue = AHEAD * options.n + slots
            self._engine = Engine(model, EngineConfig(slots=slots, context=room, images=images, queue=queue))

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.close()

    def ask(self, prompt: Prompt) -> Callable[[], list[Answer]]:
        """Starts answering; the returned function waits for the answers, in order of score or seed.

        Raises:
            ValueError: the context is too small, or an option is out of range. ImageError: a bad image.
        """
        options = self.options
        if self._engine is not None:
            tickets = self.tickets(prompt)
            return lambda: [_sampled(ticket) for ticket in tickets]
        embeddings = self.model.preprocess_batch([prompt])
        if options.choices:
            found = [
                Answer(
                    parts=(choice.text,),
                    tokens=tuple(self.model.tokenizer.encode(choice.text)),
                    logprob=choice.logprob,
                    finish="choice",
                    probability=choice.probability,
                )
                for choice in rank(score(self.model, embeddings, [options.choices])[0], options.measure)
            ]
        else:
            hypotheses = beam_search(
                self.model,
                embeddings,
                options.max_new_tokens,
                beams=options.beams,
                n=options.n,
                length_penalty=options.length_penalty,
            )[0]
            found = [
                Answer(
                    parts=(found.text,),
                    tokens=found.tokens,
                    logprob=found.logprob,
                    finish="stop" if found.finished else "length",
                )
                for found in hypotheses
            ]
        return lambda: found

    def tickets(self, prompt: Prompt) -> list[Ticket]:
        """Starts sampling the answers to a prompt; iterate over a ticket to stream its answer."""
        options = self.options
        assert self._engine is not None  # answers are sampled
        engine = self._engine
        layout = engine.layout(prompt)
        wanted = [
            RequestOptions(
                max_new_tokens=options.max_new_tokens,
                sampling=options.sampling,
                seed=options.seed + i,
                stop=options.stop,
            )
            for i in range(options.n)
        ]
        return [engine.submit(layout, one) for one in wanted]


def token_answers(
    model: TokenGenerator, prompts: Iterable[Prompt], options: AnswerOptions, count: int | None = None
) -> Iterator[list[Answer]]:
    """``Generator.answers`` of an autoregressive text model; all prompts have about the size of the first."""

    def begin(stack: contextlib.ExitStack) -> Iterator[Callable[[], list[Answer]]]:
        asker = None
        for prompt in prompts:
            asker = asker or stack.enter_context(Asker(model, options, prompt, AHEAD if count is None else count))
            yield asker.ask(prompt)

    with contextlib.ExitStack() as stack:
        for wait in _ahead(begin(stack)):
            yield wait()


def _ahead(items: Iterator[T], count: int = AHEAD - 1) -> Iterator[T]:
    """The same items, with ``count`` of them started ahead."""
    begun: collections.deque[T] = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def _sampled(ticket: Ticket) -> Answer:
    text = ticket.text()
    logprob = sum(value for piece in ticket.pieces() for value in piece.logprobs)
    return Answer(parts=(text,), tokens=tuple(ticket.tokens), logprob=logprob, finish=str(ticket.finish))
