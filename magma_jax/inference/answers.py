"""One way to ask for an answer, however it is found: sampled, searched by beams, or chosen among given ones."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from magma_jax.inference.api import Magma, padded_length
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.inference.batching.requests import RequestOptions, Ticket
from magma_jax.inference.decoding.sampling import SamplingConfig, check_seed
from magma_jax.inference.prompts import Prompt, encode_prompt
from magma_jax.inference.search.beam import beam_search
from magma_jax.inference.search.choice import Measure, rank, score

# Questions that are handed over before the answer of the first is asked for.
AHEAD = 17


@dataclasses.dataclass(frozen=True)
class AskOptions:
    """What is wanted.

    Attributes:
        max_new_tokens: at most.
        sampling: how tokens are sampled.
        seed: of the first answer; the next ones have ``seed`` + 1, ...
        n: answers to every prompt.
        stop: texts that end a sampled answer.
        beams: width of a beam search; 0 to draw.
        length_penalty: of the beam search.
        choices: answers to choose among instead of writing one.
        measure: what choices are compared by.
    """

    max_new_tokens: int = 32
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    beams: int = 0
    length_penalty: float = 1.0
    choices: tuple[str, ...] = ()
    measure: Measure = "sum"

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        check_seed(self.seed)
        check_seed(self.seed + self.n - 1)
        if self.beams and self.choices:
            raise ValueError("beams search for an answer, choices are given ones; leave one of them out")
        if self.beams and (self.sampling != SamplingConfig() or self.stop):
            raise ValueError("a beam search draws nothing: leave out temperature, the other sampling options and stop")


class Answer(NamedTuple):
    """An answer and where it comes from.

    Attributes:
        text: as it continues the prompt.
        tokens: of it, without the end of text.
        logprob: of the whole under the model.
        finish: ``stop`` at an end of text or stop text, ``length`` without, ``choice`` for a given one.
        probability: of a choice, among all of them.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    finish: str
    probability: float | None = None


class Asker:
    """Answers prompts with the same options; use it in a ``with`` block.

    Args:
        model: any.
        options: what is wanted.
        first: one of the prompts, to know what size they have; longer ones are an error later on.
        prompts: how many there will be.
    """

    def __init__(self, model: Magma, options: AskOptions, first: Prompt, prompts: int = 1):
        self.model, self.options = model, options
        self._engine: Engine | None = None
        if not (options.beams or options.choices):
            encoded = encode_prompt(first, model.config, model.tokenizer)
            room = min(padded_length(len(encoded.tokens) + options.max_new_tokens), model.config.lm.context_length)
            slots = min(8, prompts * options.n)
            images = max(len(encoded.pixels), 1) * min(8, prompts)
            self._engine = Engine(model, EngineConfig(slots, room, images, queue=AHEAD * options.n + slots))

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
        embeddings = self.model.preprocess_inputs(prompt)
        if options.choices:
            found = [
                Answer(text, tuple(self.model.tokenizer.encode(text)), answer.logprob, "choice", answer.probability)
                for answer in rank(score(self.model, embeddings, [options.choices])[0], options.measure)
                for text in [answer.text]
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
            found = [Answer(h.text, h.tokens, h.logprob, "stop" if h.finished else "length") for h in hypotheses]
        return lambda: found

    def tickets(self, prompt: Prompt) -> list[Ticket]:
        """Begins to draw the answers to a prompt; iterate over one to see it as it comes."""
        options = self.options
        encoded = self._engine.encode(prompt)
        return [
            self._engine.submit(
                encoded, RequestOptions(options.max_new_tokens, options.sampling, options.seed + i, options.stop)
            )
            for i in range(options.n)
        ]


def _sampled(ticket: Ticket) -> Answer:
    text = ticket.text()
    logprob = sum(value for piece in ticket.pieces() for value in piece.logprobs)
    return Answer(text, tuple(ticket.tokens), logprob, str(ticket.finish))
