"""The vocabulary of a language model from the metadata of a GGUF file."""

import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.foreign import shown
from magma_jax.storage.gguf.tensors import open_gguf

# Kinds of tokens: control tokens, which a text never holds, and added ones that it may.
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# ``tokenizer.ggml.pre``: how a text is split before pairs are merged.
PRE_TOKENIZERS = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def read_gguf_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Vocabulary of the language model in a file.

    Raises:
        WeightFileError: a damaged file. ConfigError: a vocabulary that is not offered.
    """
    file, metadata, _ = open_gguf(path)
    file.close()
    try:
        return tokenizer_of(metadata)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE of a file; the end of text is the token that the file names.

    Raises:
        ConfigError: another kind of vocabulary, another way to split text, or an incomplete vocabulary.
    """
    kind, splits = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splits not in PRE_TOKENIZERS:
        raise ConfigError(
            f"a vocabulary of kind {shown(kind)} that splits text as {shown(splits)} is not offered, only gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    names, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type", ())
    merges, end = metadata.get("tokenizer.ggml.merges"), metadata.get("tokenizer.ggml.eos_token_id")
    if not isinstance(names, list) or not isinstance(merges, list) or len(kinds) != len(names):
        raise ConfigError("the vocabulary lacks tokens, their types or merges; fetch the file again")
    if not isinstance(end, int) or not 0 <= end < len(names):
        raise ConfigError(f"tokenizer.ggml.eos_token_id {shown(end)} is none of the {len(names)} tokens")
    vocabulary = {name: number for number, name in enumerate(names)}
    if len(vocabulary) < len(names):
        raise ConfigError("the vocabulary has a token twice; fetch the file again")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs)
    except Exception as error:  # the binding raises plain Exception
        raise ConfigError(f"tokenizer.ggml.merges do not fit the tokens ({shown(str(error))})") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[splits]())
    backend.decoder = decoders.ByteLevel()
    for number, kind in enumerate(kinds):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(names[number], special=bool(kind == _CONTROL), normalized=False)])
    return Tokenizer(backend, eos=names[end])
