"""Answers of models that write token by token, however they are found: sampled, by beams, or among given ones."""

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

# Questions that are handed over before the answer of the first is asked for.
AHEAD = 17


class Asker:
    """Answers prompts with the same options; use it in a ``with`` block.

    Args:
        model: any that writes token by token.
        options: what is wanted.
        first: one of the prompts, to know what size they have; longer ones are an error later on.
        prompts: how many there will be.
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
        """Begins to answer; the function returned waits for the answers, best or first sampled first.

        Raises:
            ValueError: more than the context holds, or an option out of range. ImageError: a bad image.
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
        """Begins to draw the answers to a prompt; iterate over one to see it as it comes."""
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
    """``Generator.answers`` of a model that writes token by token; all prompts have about the size of the first."""

    def begin(stack: contextlib.ExitStack) -> Iterator[Callable[[], list[Answer]]]:
        asker = None
        for prompt in prompts:
            asker = asker or stack.enter_context(Asker(model, options, prompt, AHEAD if count is None else count))
            yield asker.ask(prompt)

    with contextlib.ExitStack() as stack:
        for wait in _ahead(begin(stack)):
            yield wait()


def _ahead(items: Iterator[T], count: int = AHEAD - 1) -> Iterator[T]:
    """The same items, of which some have been begun before they are wanted."""
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
