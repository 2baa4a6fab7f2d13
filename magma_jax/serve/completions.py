"""OpenAI response formats: chat completions and text completions."""

import collections
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.batching.requests import Alternatives, Progress, Ticket


class Shape(Protocol):
    """Format of the choices of a response.

    Attributes:
        prefix: prefix of the response id.
        whole: object type of a complete response.
        chunk: object type of a stream event.
    """

    prefix: str
    whole: str
    chunk: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """Content of a choice in the first event of a stream; None if there is no such event."""

    def piece(self, index: int, piece: Progress, text: str) -> dict[str, Any]:
        """Content of a choice in an event with new ``text``."""
        ...

    def choice(self, index: int, pieces: Sequence[Progress], text: str) -> dict[str, Any]:
        """Content of a choice in a complete response."""
        ...


class ChatShape:
    """Chat format: choices hold messages, stream events hold deltas."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def piece(self, index: int, piece: Progress, text: str) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "finish_reason": piece.finish, "logprobs": self._logs([piece])}

    def choice(self, index: int, pieces: Sequence[Progress], text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "finish_reason": pieces[-1].finish,
            "logprobs": self._logs(pieces),
        }

    def _logs(self, pieces: Sequence[Progress]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            # A token may be part of a character; clients join the bytes of several tokens.
            spelled = list(self._tokenizer.token_bytes(token))
            return {"token": self._tokenizer.decode([token]), "logprob": probability(logprob), "bytes": spelled}

        content = [
            entry(token, logprob) | {"top_logprobs": [entry(*other) for other in top]}
            for token, logprob, top in _sampled(pieces)
        ]
        return {"content": content, "refusal": None}


class TextShape:
    """Text format: choices hold texts, in complete responses and in stream events.

    Args:
        tokenizer: tokenizer of the model.
        logprobs: whether log-probabilities are requested.
        echo: text to prepend to each choice; None for no echo.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool, echo: Sequence[str] | None = None):
        self._tokenizer, self._logprobs, self._echo = tokenizer, logprobs, echo
        # Characters of each choice already sent, for the text offsets of log-probabilities.
        self._told: dict[int, int] = collections.defaultdict(int)

    def opening(self, index: int) -> dict[str, Any] | None:
        if self._echo is None:
            return None
        return {"index": index, "text": self._echo[index], "finish_reason": None, "logprobs": None}

    def piece(self, index: int, piece: Progress, text: str) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "finish_reason": piece.finish,
            "logprobs": self._logs(index, [piece]),
        }

    def choice(self, index: int, pieces: Sequence[Progress], text: str) -> dict[str, Any]:
        text = text if self._echo is None else self._echo[index] + text
        return {
            "index": index,
            "text": text,
            "finish_reason": pieces[-1].finish,
            "logprobs": self._logs(index, pieces),
        }

    def _logs(self, index: int, pieces: Sequence[Progress]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens, logprobs, tops, offsets = [], [], [], []
        for token, logprob, top in _sampled(pieces):
            tokens.append(self._tokenizer.decode([token]))
            logprobs.append(probability(logprob))
            tops.append({self._tokenizer.decode([other]): probability(value) for other, value in top})
            offsets.append(self._told[index])
            self._told[index] += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _sampled(pieces: Sequence[Progress]) -> Iterator[tuple[int, float, Alternatives]]:
    """Tokens with their log-probabilities and alternatives."""
    for piece in pieces:
        yield from zip(piece.tokens, piece.logprobs, piece.top or [()] * len(piece.tokens), strict=True)


def head(shape: Shape, kind: str, model: str) -> dict[str, Any]:
    """Common fields of a response or a stream event."""
    return {
        "id": f"{shape.prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(answers: Sequence[Sequence[Ticket]]) -> dict[str, Any]:
    """Token usage of a request; ``answers`` holds the tickets of each prompt."""
    prompt = sum(tickets[0].prompt_tokens for tickets in answers)
    cached = sum(tickets[0].reused_tokens for tickets in answers)
    new = sum(len(ticket.tokens) for tickets in answers for ticket in tickets)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def probability(logprob: float) -> float:
    """Log-probability with a finite value, since JSON has no -inf."""
    return logprob if math.isfinite(logprob) else -9999.0
