"""Grammars: constraints compiled for a tokenizer by llguidance, which give the allowed tokens at every step."""

import collections
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.structured.constraints import Constraint, ConstraintError, installed
from magma_jax.inference.structured.grammar_trial import Trial, TrialError, Verdict, Vocabulary
from magma_jax.typing import UInt32

# Bits per mask word.
BITS = 32
# Grammars whose trial result is cached.
REMEMBERED = 256
# Characters of forced text that are tokenized at once: tokenizing one long word takes superlinear time.
STRETCH = 512
# Maximum length of an error message about a grammar.
MAX_REASON = 300


class GuideError(RuntimeError):
    """An answer that cannot continue under its constraint; the message is one line."""


def mask_words(ids: int) -> int:
    """Number of mask words for ``ids`` token ids."""
    return -(-ids // BITS)


def everything(rows: int, ids: int) -> UInt32[np.ndarray, "{rows} W"]:
    """Masks that allow every token."""
    return np.full((rows, mask_words(ids)), 0xFFFFFFFF, np.uint32)


class Grammars:
    """Compiles constraints for one tokenizer; thread-safe, one at a time.

    Nothing is loaded before the first constraint. ``close`` ends the trial process.

    Args:
        tokenizer: any byte-level tokenizer.
        table_rows: ids from here on are never sampled.
        ids: number of the model's logits, at least ``table_rows``.

    Attributes:
        trial: the trial process; None before the first constraint.
    """

    def __init__(self, tokenizer: Tokenizer, *, table_rows: int, ids: int):
        self._tokenizer, self._table_rows, self._ids = tokenizer, table_rows, ids
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self.trial: Trial | None = None
        self._verdicts: collections.OrderedDict[str, Verdict] = collections.OrderedDict()

    def compile(self, constraint: Constraint) -> "Grammar":
        """Compiles a constraint; takes some milliseconds, and a second at most.

        Raises:
            ConstraintError: a constraint that llguidance does not support or that takes too much time or memory, a
                tokenizer that is not byte-level, or llguidance is not installed.
        """
        with self._lock:
            if self._vocabulary is None:
                self._load()
            space = constraint.begins_with_space
            if space is None:
                alone = self._compiled(constraint.grammar(space=False))
                space = self._may_begin_with_space(alone.start())
                return alone if space else self._compiled(constraint.grammar(space=True), skips_space=True)
            return self._compiled(constraint.grammar(space=not space), skips_space=not space)

    def close(self) -> None:
        """Ends the trial process; a further constraint starts another."""
        with self._lock:
            if self.trial is not None:
                self.trial.close()

    def _load(self) -> None:
        if not installed():
            raise ConstraintError("the server has no llguidance; pip install llguidance")
        tokens = [self._tokenizer.token_bytes(token) for token in range(self._table_rows)]
        spelled = (self._tokenizer.decode([token]) for token in range(self._table_rows))
        # A vocabulary of words spells none of the characters that a grammar asks for one by one.
        letters = {bytes([letter]) for letter in range(128)} <= set(tokens)
        if not letters or any(
            one.decode(errors="replace") != other for one, other in zip(tokens, spelled, strict=True)
        ):
            raise ConstraintError("the model's tokenizer does not spell bytes, so answers cannot be constrained")
        tokens += [b""] * (self._ids - self._table_rows)
        # llguidance knows one end of text; guides allow the others where it allows that one.
        special, eos_id = sorted(self._tokenizer.special_ids), self._tokenizer.eos_id
        self.trial = Trial(tokens, special, eos_id)
        self._vocabulary = Vocabulary(tokens, special, eos_id, self._encode)
        self._begins_with_space = np.array([token.startswith(b" ") for token in tokens])

    def _encode(self, text: str) -> list[int]:
        stretches = (text[start : start + STRETCH] for start in range(0, len(text), STRETCH))
        return [token for stretch in stretches for token in self._tokenizer.encode(stretch)]

    def _compiled(self, text: str, *, skips_space: bool = False) -> "Grammar":
        assert self.trial is not None  # compile has loaded both
        assert self._vocabulary is not None
        try:
            verdict = self._verdicts.pop(text, None) or self.trial(text)
        except TrialError as error:
            raise ConstraintError(str(error)) from None
        self._verdicts[text] = verdict
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if verdict.error is not None:
            raise ConstraintError(_one_line(verdict.error))
        matcher = self._vocabulary.matcher(text)
        if matcher.is_error():
            raise ConstraintError(_one_line(matcher.get_error()))
        grammar = Grammar(matcher, self._ids, self._tokenizer.end_ids, nbytes=verdict.nbytes, skips_space=skips_space)
        try:
            grammar.start()
        except GuideError as error:
            raise ConstraintError(str(error)) from None
        return grammar

    def _may_begin_with_space(self, guide: "Guide") -> bool:
        allowed = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")[: self._ids]
        return bool((allowed & self._begins_with_space).any())


class Grammar:
    """A compiled constraint; every request has its own ``Guide``.

    Attributes:
        nbytes: approximate memory use.
    """

    def __init__(self, matcher: Any, ids: int, ends: Sequence[int], *, nbytes: int, skips_space: bool):
        self._matcher, self._ids, self._ends, self._skips_space = matcher, ids, ends, skips_space
        self.nbytes = nbytes

    def start(self) -> "Guide":
        """A guide at the beginning of an answer."""
        return Guide(self._matcher.deep_copy(), self._ids, self._ends, skips_space=self._skips_space)


class Guide:
    """Position of one answer in its grammar. Not thread-safe.

    Attributes:
        mask: (W,) mask of the allowed next tokens, one bit per id, lowest first.
        complete: whether the answer is complete and only an end of text is allowed.
    """

    def __init__(self, matcher: Any, ids: int, ends: Sequence[int], *, skips_space: bool):
        self._matcher, self._words, self._at_space = matcher, mask_words(ids), skips_space
        # The first one is llguidance's.
        self._end = _bit(ends[0], self._words)
        self._ends = np.bitwise_or.reduce([_bit(end, self._words) for end in ends if end < ids])
        # Forced tokens, as the tokenizer splits their text.
        self._fixed: collections.deque[int] = collections.deque()
        self._look()

    def advance(self, tokens: Sequence[int]) -> None:
        """Advances by these tokens, which do not include the end of text.

        Raises:
            GuideError: a token that was not allowed, or a grammar that becomes too expensive from here on.
        """
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise self._error()
            if self._fixed:
                self._fixed.popleft()
        self._look()

    def shown(self, text: str) -> str:
        """New text of the answer, without the extra space that may precede it."""
        if not (self._at_space and text):
            return text
        self._at_space = False
        return text.removeprefix(" ")

    def _look(self) -> None:
        if not self._fixed:
            self._fixed.extend(self._matcher.compute_ff_tokens())
        if self._fixed:
            self.mask = _bit(self._fixed[0], self._words)
        else:
            self.mask = np.frombuffer(self._matcher.compute_bitmask(), "<u4").astype(np.uint32)
        if self._matcher.is_error():
            raise self._error()
        self.complete = self._matcher.is_stopped() or np.array_equal(self.mask, self._end)
        if (self.mask & self._end).any():
            self.mask = self.mask | self._ends

    def _error(self) -> GuideError:
        return GuideError(f"the answer cannot continue under its constraint ({_one_line(self._matcher.get_error())})")


def _bit(token: int, words: int) -> UInt32[np.ndarray, "{words}"]:
    """The mask that allows one token."""
    mask = np.zeros(words, np.uint32)
    mask[token // BITS] = np.uint32(1) << np.uint32(token % BITS)
    return mask


def _one_line(reason: str) -> str:
    """llguidance's error message in one line, without its advice and excerpts of its notation."""
    lines = [line.strip() for line in reason.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("|", "^", "<")) and not line[0].isdigit()]
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", " ".join(kept))
    return text.partition(". Enable")[0][:MAX_REASON] or "no reason given"
