"""Padded texts of image-text pairs, by any of the text tokenizers."""

import os
import random
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.clip_bpe import FILE, ClipBPE, PaddedText, clip_bpe

TextTokenizer: TypeAlias = Tokenizer | ClipBPE

# Texts with more tokens than there is room for: cut, as in the original of MAGVLT, or an error.
TooLong = Literal["cut", "error"]

# clip: CLIP's vocabulary. quickstart: the 2,048 tokens of the quick starts' vocabulary, which is part of the package.
TextTokenizerName = Literal["clip", "quickstart"]
QUICKSTART = "assets/tokenizer.json"


def text_tokenizer(name: TextTokenizerName) -> TextTokenizer:
    """A tokenizer of the package by name."""
    if name == "clip":
        return clip_bpe()
    with resources.as_file(resources.files("magma_jax") / QUICKSTART) as path:
        return Tokenizer.load(path)


def load_text_tokenizer(folder: str | os.PathLike) -> TextTokenizer:
    """The tokenizer that ``save`` wrote to a folder.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    return clip_bpe() if (Path(folder) / FILE).is_file() else Tokenizer.load(folder)


def encode_padded(
    tokenizer: TextTokenizer,
    text: str,
    length: int,
    *,
    too_long: TooLong = "cut",
    dropout: float = 0.0,
    rng: random.Random | None = None,
) -> PaddedText:
    """Ids of a text, padded with the end token.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        length: number of ids.
        too_long: what becomes of a text of more tokens.
        dropout: BPE dropout, which only ``ClipBPE`` has.
        rng: source of the dropout.

    Raises:
        ValueError: ``too_long`` is ``error`` and the text is; or a dropout that the tokenizer lacks.
    """
    if isinstance(tokenizer, ClipBPE):
        return tokenizer.encode_padded(text, length, too_long=too_long, dropout=dropout, rng=rng)
    if dropout:
        raise ValueError(f"dropout {dropout}: only the tokenizer clip drops merges; set it to 0")
    ids = tokenizer.encode(text)
    if too_long == "error" and len(ids) > length:
        raise ValueError(f"the text has {len(ids)} tokens, more than {length}: {text[:60]!r}; shorten it")
    padded = [*ids[:length], *[tokenizer.pad_id] * (length - len(ids))]
    return PaddedText(tuple(padded), min(len(ids) + 1, length))


def separator_id(tokenizer: TextTokenizer) -> int:
    """Id of "|", which separates two texts in one."""
    return tokenizer.separator_id if isinstance(tokenizer, ClipBPE) else tokenizer.encode("|")[0]
