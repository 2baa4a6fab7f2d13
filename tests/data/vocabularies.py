"""Vocabularies as other libraries write them, small ones."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from magma_jax.data.tokenizers.byte_level import byte_symbols


def pieces(prepend=False, metaspace=False):
    """A vocabulary of pieces with tokens for bytes, as Gemma's; with ``prepend`` as Llama 2's and Phi-3's, with
    ``metaspace`` as that of Mistral 0.3.
    """
    letters = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", ","]
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = [("\u2581", "a")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "\u2581")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace] if prepend else [replace])
    decode = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend or metaspace:
        decode.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decode)
    return backend


def published(folder, backend, special, template=None, *, begin=None, **settings):
    """A tokenizer's folder on the hub: ``special`` tokens by name, and ``begin`` put there by ``tokenizer.json``."""
    backend.add_special_tokens(list(dict.fromkeys(special.values())))
    if begin is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    backend.save(str(folder / "tokenizer.json"))
    content = {**special, **settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        content["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def bytes_alone():
    """A byte-level vocabulary without merges."""
    vocab = {symbol: number for number, symbol in enumerate(byte_symbols())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
