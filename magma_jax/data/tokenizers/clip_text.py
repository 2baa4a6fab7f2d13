"""CLIP's own text tokenizer, with its splitting of words; MAGVLT's has another (``clip_bpe``)."""

import functools
import html
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from magma_jax.data.tokenizers.byte_level import EOS, byte_symbols, packaged_merges
from magma_jax.data.tokenizers.clip_bpe import END_OF_WORD, START
from magma_jax.typing import Int

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPACES = re.compile(r"\s+")


def clip_text_ids(texts: Sequence[str], length: int = 77) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, " N"]]:
    """Ids of texts, padded with 0 to ``length``, and the place of each end token. Longer texts are cut before it.

    HTML entities are resolved and white space becomes single spaces, as in CLIP; its repair of wrongly decoded
    characters (``ftfy``) is left out.
    """
    backend = _tokenizer()
    start, end = backend.token_to_id(START), backend.token_to_id(EOS)
    ids, ends = np.zeros((len(texts), length), np.int32), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        clean = _SPACES.sub(" ", html.unescape(html.unescape(text))).strip().lower()
        found = backend.encode(clean).ids[: length - 2]
        ends[row] = len(found) + 1
        ids[row, : len(found) + 2] = [start, *found, end]
    return ids, ends


@functools.cache
def _tokenizer() -> Tokenizer:
    merges = packaged_merges("clip")
    symbols = [*byte_symbols()]
    symbols += [symbol + END_OF_WORD for symbol in symbols]
    symbols += [*(left + right for left, right in merges), START, EOS]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, unk_token=EOS))
    backend.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend
