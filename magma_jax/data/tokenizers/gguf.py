"""The vocabulary of a language model from the metadata of a GGUF file."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.settings import settings_of
from magma_jax.foreign import shown
from magma_jax.storage.gguf.tensors import open_gguf

# Kinds of tokens: control tokens, which a text never holds, and added ones that it may.
_CONTROL, _USER_DEFINED = 3, 4
# Ends of a turn and of a message, beside the end of text.
_ENDS = ("eot_token_id", "eom_token_id")
# Names that chat templates use.
_NAMES = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "padding_token_id": "pad_token"}
# Vocabularies that take words whole where they have them, and put their begin before a text if a file says nothing.
_LLAMA_BPE = "llama-bpe"
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
    """Byte-level BPE of a file; the ends of text are the tokens that the file names.

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
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(names, list) or not isinstance(merges, list) or len(kinds) != len(names):
        raise ConfigError("the vocabulary lacks tokens, their types or merges; fetch the file again")
    if (end := _token(metadata, "eos_token_id", names)) is None:
        raise ConfigError("the vocabulary lacks tokenizer.ggml.eos_token_id; fetch the file again")
    vocabulary = {name: number for number, name in enumerate(names)}
    if len(vocabulary) < len(names):
        raise ConfigError("the vocabulary has a token twice; fetch the file again")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=splits == _LLAMA_BPE)
    except Exception as error:  # the binding raises plain Exception
        raise ConfigError(f"tokenizer.ggml.merges do not fit the tokens ({shown(str(error))})") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[splits]())
    backend.decoder = decoders.ByteLevel()
    for number, kind in enumerate(kinds):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(names[number], special=bool(kind == _CONTROL), normalized=False)])
    special = {name: _token(metadata, name, names) for name in (*_NAMES, *_ENDS)}
    if _setting(metadata, "add_bos_token", splits == _LLAMA_BPE):
        if (begin := special["bos_token_id"]) is None:
            raise ConfigError("tokenizer.ggml.add_bos_token is set, and there is no tokenizer.ggml.bos_token_id")
        pair = (begin, vocabulary[begin])
        backend.post_processor = processors.TemplateProcessing(single=f"{begin}:0 $A:0", special_tokens=[pair])
    for name in ("add_eos_token", "add_space_prefix"):
        if _setting(metadata, name, False):
            raise ConfigError(f"tokenizer.ggml.{name} is set, which is not offered")
    content = {
        **{ours: special[name] for name, ours in _NAMES.items()},
        "chat_template": metadata.get("tokenizer.chat_template"),
        "eos_token_id": [vocabulary[token] for name in _ENDS if (token := special[name]) is not None],
    }
    try:
        return Tokenizer(backend, eos=end, settings=settings_of(content))
    except ValueError as error:
        raise ConfigError(f"the vocabulary {error}") from None


def _token(metadata: Mapping[str, Any], name: str, names: Sequence[str]) -> str | None:
    """The token of an id in the metadata."""
    number = metadata.get(f"tokenizer.ggml.{name}")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(names):
        raise ConfigError(f"tokenizer.ggml.{name} {shown(number)} is none of the {len(names)} tokens")
    return names[number]


def _setting(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ConfigError(f"tokenizer.ggml.{name} {shown(value)} is neither true nor false")
    return value
