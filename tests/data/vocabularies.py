"""Vocabularies as other libraries write them, small ones."""

import tokenizers


def pieces(prepend=False):
    """A vocabulary of pieces with tokens for bytes, as Gemma's; with ``prepend`` as Llama 2's."""
    letters = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", ","]
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = [("\u2581", "a")]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = tokenizers.normalizers.Replace(" ", "\u2581")
    steps = [tokenizers.normalizers.Prepend("\u2581"), replace] if prepend else [replace]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    decode = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if prepend:
        decode.append(tokenizers.decoders.Strip(" ", 1, 0))
    backend.decoder = tokenizers.decoders.Sequence(decode)
    return backend
