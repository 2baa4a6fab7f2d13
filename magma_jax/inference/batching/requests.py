"""Requests of the engine: options, progress, and the ticket that callers wait on."""

import codecs
import dataclasses
from collections.abc import Sequence
from typing import Literal

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.decoding.config import SamplingConfig, check_seed
from magma_jax.inference.pending import Pending
from magma_jax.inference.structured.constraints import Constraint
from magma_jax.inference.structured.grammars import Grammar

# Why a request ended: an end of text or stop text, its limit, or cancellation.
FinishReason = Literal["stop", "length", "cancelled"]

# Maximum number of alternatives per token, as in OpenAI's API.
MAX_TOP_LOGPROBS = 20

# The likeliest tokens at one position, with their log-probabilities.
Alternatives = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Options of a request.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        sampling: sampling parameters; ``compat`` is not supported.
        seed: gives the same answer as ``batched.generate_tokens(..., seed=[seed])``.
        stop: texts that end the answer and are not part of it.
        top_logprobs: number of likeliest alternatives to report for each token.
        min_new_tokens: number of tokens before which the end of text is not sampled; a stop text, or a constraint that
            allows only the end, still ends the answer.
        constraint: constraint on the answer, a ``Constraint`` or the result of ``Engine.compile``. The answer may be
            cut short by ``max_new_tokens`` or a stop text.
    """

    max_new_tokens: int = 64
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    min_new_tokens: int = 0
    constraint: Constraint | Grammar | None = None

    def __post_init__(self):
        check_seed(self.seed)
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must lie between 0 and {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must lie between 0 and max_new_tokens ({self.max_new_tokens}), got "
                f"{self.min_new_tokens}"
            )
        if any(not text for text in self.stop):
            raise ValueError("stop: an empty text would end every answer at once")
        if self.sampling.compat is not None:
            raise ValueError("compat is for single runs (generate_tokens), not for batched serving")


@dataclasses.dataclass(frozen=True)
class Progress:
    """A piece of an answer: new text, and its tokens.

    Attributes:
        text: new text.
        tokens: new tokens.
        logprobs: log-probabilities of the tokens.
        top: alternatives for each token, if requested.
        finish: why the answer ended, on the last piece only.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Alternatives, ...] = ()
    finish: FinishReason | None = None


class Ticket(Pending[Progress]):
    """An accepted request. Iterate over it to stream ``Progress``, or wait for ``text()``.

    Attributes:
        prompt_tokens: positions of the prompt, images included.
        reused_tokens: positions of these that were reused from an earlier prompt's cache.
    """

    def __init__(self, prompt_tokens: int, options: RequestOptions):
        super().__init__()
        self.prompt_tokens, self.options = prompt_tokens, options
        self.reused_tokens = 0

    def text(self) -> str:
        """Waits for the answer and returns its whole text."""
        return "".join(piece.text for piece in self)

    @property
    def tokens(self) -> list[int]:
        """Tokens of the answer so far, without its end of text."""
        return [token for piece in self.pieces() for token in piece.tokens]


class TextAssembler:
    """Incremental detokenizer: complete characters only, up to a stop text.

    Every token is decoded once and only unshown text is searched, so the time per token does not grow with the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        # Buffers the bytes of an incomplete character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # possible beginning of a stop text

    def add(self, tokens: Sequence[int], *, last: bool) -> tuple[str, int | None]:
        """New text, and the number of ``tokens`` until a stop text ended the answer (None if none did).

        Incomplete characters and possible beginnings of a stop text are held back, unless these tokens are the last.
        """
        text, self.held = self.held, ""
        for count, token in enumerate(tokens, start=1):
            new = self._decoder.decode(self._tokenizer.token_bytes(token))
            text += new
            # A stop text can only end within the new text.
            begin = max(len(text) - len(new) - self._longest + 1, 0)
            found = min((at for stop in self._stop if (at := text.find(stop, begin)) >= 0), default=None)
            if new and found is not None:
                return text[:found], count
        if last:
            return text + self._decoder.decode(b"", final=True), None
        shown = len(text) - self._beginning(text)
        self.held = text[shown:]
        return text[:shown], None

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop text."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
