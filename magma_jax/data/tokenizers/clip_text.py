"""CLIP's own tokenizer, for its text encoder; that of MAGVLT, with the same vocabulary, is ``clip_bpe``."""

import functools
import html
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from magma_jax.data.tokenizers.byte_level import EOS, byte_symbols, packaged_merges
from magma_jax.data.tokenizers.clip_bpe import END_OF_WORD, START
from magma_jax.typing import Int

# Contractions, runs of letters, single digits, runs of other characters.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clip_tokens(texts: Sequence[str], length: int) -> Int[np.ndarray, "N {length}"]:
    """Ids of texts with start and end, zeros behind the end; a longer text is cut, and its last id is the end.

    As the original's but for texts whose encoding was damaged, which it repairs by the package ftfy.
    """
    encoder = _encoder()
    start, end = encoder.token_to_id(START), encoder.token_to_id(EOS)
    found = np.zeros((len(texts), length), np.int32)
    cleaned = [" ".join(html.unescape(html.unescape(text)).split()).lower() for text in texts]
    for row, encoded in zip(found, encoder.encode_batch(cleaned, add_special_tokens=False), strict=True):
        ids = [start, *encoded.ids[: length - 2], end]
        row[: len(ids)] = ids
    return found


@functools.cache
def _encoder() -> tokenizers.Tokenizer:
    merges = packaged_merges("clip")
    symbols = byte_symbols()
    names = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *(a + b for a, b in merges), START, EOS]
    encoder = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges, end_of_word_suffix=END_OF_WORD)
    )
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return encoder
