"""The OpenAI chat-completions shape: what an answer looks like."""

import math
import time
import uuid
from typing import Any

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.batching.requests import Progress, Ticket


def head(kind: str, model: str) -> dict[str, Any]:
    """What every answer and every chunk of a stream begins with."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(tickets: list[Ticket]) -> dict[str, Any]:
    """How many tokens a request took and got."""
    prompt, new = tickets[0].prompt_tokens, sum(len(ticket.tokens) for ticket in tickets)
    cached = {"cached_tokens": tickets[0].reused_tokens}
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": cached}


def logprobs(tokenizer: Tokenizer, pieces: list[Progress]) -> dict[str, Any]:
    """Log-probabilities of the tokens of an answer or a piece of one."""

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


def probability(logprob: float) -> float:
    """A log-probability as JSON can hold it: -inf has no place there."""
    return logprob if math.isfinite(logprob) else -9999.0
