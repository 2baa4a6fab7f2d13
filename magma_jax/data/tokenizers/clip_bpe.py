"""CLIP's vocabulary with BERT's splitting of words: the text tokenizer of MAGVLT.

Ids differ from CLIP's own for many texts: every punctuation character is a word ("it's" is three), digits stay in one
word, and symbols are characters instead of UTF-8 bytes. So of the characters beyond ASCII only those are known that
stand for a byte in CLIP's alphabet, such as "é"; a caption with any other loses all its characters beyond ASCII.
"""

import dataclasses
import functools
import heapq
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import normalizers, pre_tokenizers

from magma_jax.data.tokenizers.byte_level import EOS, byte_symbols, packaged_merges

START = "<|startoftext|>"
END_OF_WORD = "</w>"

# Text tokens of a caption in the published models.
LENGTH = 64

# In the tokenizer's folder of a model: says that it is this one, whose vocabulary is part of the package.
FILE = "clip_bpe.json"


@dataclasses.dataclass(frozen=True)
class PaddedText:
    """Ids of a caption, padded, and the number of those that count: its tokens and one end token, if it has room."""

    ids: tuple[int, ...]
    length: int


class UnknownCharacterError(ValueError):
    """A text with a character that is not in the vocabulary."""


class ClipBPE:
    """Lower-case tokenizer with 49,408 ids and without a start token; the end token is also the padding.

    Attributes:
        eos_id: id of ``<|endoftext|>``.
        pad_id: the same id.
        separator_id: id of "|" without the end of a word, which separates two captions in one.
    """

    def __init__(self):
        merges = packaged_merges("clip")
        symbols = byte_symbols()
        self._symbols = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
        self._symbols += [*(left + right for left, right in merges), START, EOS]
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        # Control characters become nothing, other white space a space; Chinese characters are words; accents stay.
        clean = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )
        self._normalizer = normalizers.Sequence([clean, normalizers.Lowercase()])
        self._splitter = pre_tokenizers.BertPreTokenizer()
        self._cached = functools.lru_cache(maxsize=2**16)(self._merge)
        self.eos_id = self.pad_id = self._ids[EOS]
        self.separator_id = self._ids["|"]

    def __reduce__(self):
        return clip_bpe, ()

    def __len__(self) -> int:
        """Number of ids."""
        return len(self._symbols)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes ``FILE`` to a folder and returns its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"tokenizer": "clip"}) + "\n", encoding="utf-8")
        return path

    def encode(self, text: str, *, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """Ids of a text, without an end token.

        Args:
            text: if it has an unknown character, all characters beyond ASCII are left out of it.
            dropout: rate at which a possible merge is skipped until another was made (BPE dropout, Provilkov et al.,
                2020), for training.
            rng: source of the dropout; equal states give equal ids.

        Raises:
            ValueError: a rate below 0 or of 1 or more, or dropout without ``rng``.
        """
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if dropout and rng is None:
            raise ValueError("dropout needs an rng")
        try:
            return self._encode(text, dropout, rng)
        except UnknownCharacterError:
            return self._encode(text.encode("ascii", "ignore").decode(), dropout, rng)

    def encode_padded(
        self,
        text: str,
        length: int = LENGTH,
        *,
        too_long: Literal["cut", "error"] = "cut",
        dropout: float = 0.0,
        rng: random.Random | None = None,
    ) -> PaddedText:
        """Ids of a text, padded to ``length`` with the end token.

        Args:
            text: see ``encode``.
            length: number of ids.
            too_long: a text of more than ``length`` tokens is cut, as in the original, or an error.
            dropout: see ``encode``.
            rng: see ``encode``.

        Raises:
            ValueError: ``too_long`` is ``error`` and the text is.
        """
        ids = self.encode(text, dropout=dropout, rng=rng)
        if too_long == "error" and len(ids) > length:
            raise ValueError(f"the text has {len(ids)} tokens, more than {length}: {text[:60]!r}; shorten it")
        padded = [*ids[:length], *[self.pad_id] * (length - len(ids))]
        return PaddedText(tuple(padded), min(len(ids) + 1, length))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids before the first end token: lower-case words with a space between them.

        Raises:
            ValueError: an id beyond the vocabulary.
        """
        pieces = []
        for i in ids:
            if i == self.eos_id:
                break
            if not 0 <= i < len(self):
                raise ValueError(f"text ids are 0 to {len(self) - 1}, got {i}")
            pieces.append(self._symbols[i])
        return "".join(pieces).replace(END_OF_WORD, " ").removesuffix(" ")

    def _encode(self, text: str, dropout: float, rng: random.Random | None) -> list[int]:
        words = self._splitter.pre_tokenize_str(self._normalizer.normalize_str(text))
        if dropout and rng is not None:
            return [i for word, _ in words for i in self._merge(word, dropout, rng)]
        return [i for word, _ in words for i in self._cached(word)]

    def _merge(self, word: str, dropout: float = 0.0, rng: random.Random | None = None) -> tuple[int, ...]:
        """Ids of a word: of its adjacent pairs the one of lowest rank is merged, until none is left."""
        pieces: list[str] = [*word[:-1], word[-1] + END_OF_WORD]
        if unknown := [piece for piece in pieces if piece not in self._ids]:
            raise UnknownCharacterError(f"{unknown[0]!r} is not in the vocabulary")
        end = len(pieces)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))  # neighbours; merged pieces become empty
        queue: list[tuple[int, int, str]] = []

        def add(i: int) -> None:
            if i >= 0 and after[i] < end and (rank := self._ranks.get((pieces[i], pieces[after[i]]))) is not None:
                heapq.heappush(queue, (rank, i, pieces[i] + pieces[after[i]]))

        for i in range(end):
            add(i)
        skipped: list[tuple[int, int, str]] = []
        while queue:
            entry = heapq.heappop(queue)
            if rng is not None and rng.random() < dropout:
                skipped.append(entry)
                continue
            # As in the library of the original: also an outdated pair brings the skipped ones back.
            for other in skipped:
                heapq.heappush(queue, other)
            skipped.clear()
            _, i, merged = entry
            j = after[i]
            if j >= end or pieces[i] + pieces[j] != merged or (pieces[i], pieces[j]) not in self._ranks:
                continue
            pieces[i], pieces[j], after[i] = merged, "", after[j]
            if after[i] < end:
                before[after[i]] = i
            add(before[i])
            add(i)
        return tuple(self._ids[piece] for piece in pieces if piece)


@functools.cache
def clip_bpe() -> ClipBPE:
    """The tokenizer; one for the process, since it is immutable."""
    return ClipBPE()
