"""BPE tokenizers: GPT-2's, from packaged merges, newly trained ones, and those of published language models.

Tokens are bytes (GPT-2, Llama 3, Qwen), or pieces of text with a token for each byte beside them (Gemma).
"""

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from magma_jax.foreign import read_json, read_text

EOS = "<|endoftext|>"
IMAGE = "<|image|>"
# End-of-text tokens of published vocabularies, for files without a ``tokenizer_config.json``.
_EOS_NAMES = (EOS, "<|end_of_text|>", "<eos>", "</s>")
# Beside ``tokenizer.json``, as in Hugging Face's folders: names the end of text.
_SETTINGS_FILE = "tokenizer_config.json"
# Bytes and spaces in the tokens of a vocabulary of pieces.
_BYTE, _SPACE = re.compile(r"<0x([0-9A-F]{2})>"), "\u2581"

# Replacements of ``clean_up``, in this order: the space before English punctuation and contractions is removed, as in
# the original's transformers 4.6 by default.
_CLEAN_UP = (" .", " ?", " !", " ,"), " ' ", (" n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """Tokenizer with an end-of-text token (also used for padding) and an image placeholder.

    Wraps a ``tokenizers.Tokenizer``; immutable, so it is thread-safe and picklable. ``<|image|>`` gets the next free id
    if the vocabulary lacks it, as in the original.

    Attributes:
        eos: text of the end-of-text token.
        longest: bytes of the longest token: a text of N bytes has at least N / ``longest`` tokens.
        special_ids: ids that ``decode`` skips: these two, and the other special tokens of the vocabulary.

    Raises:
        ValueError: the vocabulary has no ``eos`` token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = EOS, image: str = IMAGE):
        if backend.token_to_id(eos) is None:
            raise ValueError(f"the vocabulary has no end-of-text token {eos!r}; name its own with eos=...")
        self._names = eos, image
        # Two copies, because parsing of special tokens is a property of the object, not an argument.
        self._parsing = _without_padding(backend.to_str())
        self._parsing.add_special_tokens([eos, image])
        self._plain = _without_padding(self._parsing.to_str())
        self._plain.encode_special_tokens = True
        self.eos = eos
        vocabulary = self._parsing.get_vocab(with_added_tokens=True)
        self.eos_id: int = vocabulary[eos]
        self.pad_id: int = self.eos_id
        self.image_id: int = vocabulary[image]
        added = self._parsing.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._rows = max(vocabulary.values()) + 1
        self._of_bytes = isinstance(backend.decoder, decoders.ByteLevel)
        # Each character of a byte-level token represents one byte.
        self.longest: int = max(len(symbols) if self._of_bytes else len(symbols.encode()) for symbols in vocabulary)

    def __reduce__(self):
        # The backend's pickling loses the property that special tokens in text are not parsed.
        return _rebuild, (self._parsing.to_str(), *self._names)

    def __len__(self) -> int:
        """Number of ids, ``<|image|>`` included: the rows of an embedding table."""
        return self._rows

    @property
    def vocab_size(self) -> int:
        """Number of ids without ``<|image|>``, as the original counts (50257 for GPT-2)."""
        return len(self) - 1

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of ``text``, without added tokens.

        By default the spelling of a special token is plain text, so that a caption cannot contain an end or an image
        token. With ``parse_special`` it becomes the token, as in the original.
        """
        backend = self._parsing if parse_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, clean_up: bool = False) -> str:
        """Text of ``ids``; ids beyond the vocabulary are the empty string.

        Inverts ``encode`` exactly. With ``skip_special=False, clean_up=True`` (no space before marks and
        contractions) it equals the original, where ``" ,"`` comes back as ``","``.
        """
        text = self._parsing.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return _clean_up(text) if clean_up else text

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token, possibly part of a character; empty for special tokens and unknown ids.

        The concatenated bytes of several tokens are the UTF-8 encoding of their ``decode``.
        """
        symbols = self._parsing.id_to_token(token)
        if symbols is None or token in self.special_ids:
            return b""
        if not self._of_bytes:
            byte = _BYTE.fullmatch(symbols)
            return bytes.fromhex(byte[1]) if byte else symbols.replace(_SPACE, " ").encode()
        known = _symbol_bytes()
        # Tokens added to a vocabulary, such as runs of spaces, are plain text.
        return bytes(known[symbol] for symbol in symbols) if known.keys() >= set(symbols) else symbols.encode()

    def to_json(self) -> str:
        """The tokenizer as JSON text, in the ``tokenizers`` format."""
        return self._parsing.to_str()

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes ``folder/tokenizer.json`` (the ``tokenizers`` format) and returns its path.

        An end-of-text token other than GPT-2's is named in a ``tokenizer_config.json`` beside it.
        """
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        if self.eos != EOS:
            path.with_name(_SETTINGS_FILE).write_text(json.dumps({"eos_token": self.eos}) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, text: str, eos: str | None = None, image: str = IMAGE) -> "Tokenizer":
        """Inverse of ``to_json``; by default the end of text is the first of the usual ones that it has.

        Raises:
            ValueError: not in the ``tokenizers`` format, or no ``eos`` in it.
        """
        return _from_json(text, eos, image)

    @classmethod
    def load(cls, path: str | os.PathLike, eos: str | None = None, image: str = IMAGE) -> "Tokenizer":
        """Reads a ``tokenizer.json``, or the one in a folder.

        By default the end of text is that of the ``tokenizer_config.json`` beside it, if there is one, or as
        ``from_json`` finds it.

        Raises:
            ValueError: not such a file, or no ``eos`` in it.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls.from_json(read_text(path), eos or _named_eos(path.with_name(_SETTINGS_FILE)), image)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} {error}") from None


# GPT-2's takes half a second to parse, and a process may open many folders with it.
@functools.lru_cache(maxsize=4)
def _from_json(text: str, eos: str | None, image: str) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the binding raises plain Exception
        raise ValueError(f"is not a tokenizer.json: {error}") from None
    if eos is None:
        eos = next((name for name in _EOS_NAMES if backend.token_to_id(name) is not None), EOS)
    return Tokenizer(backend, eos, image)


def _named_eos(settings: Path) -> str | None:
    """The end of text that a ``tokenizer_config.json`` names; None if there is none. Raises ValueError."""
    if not settings.is_file():
        return None
    content = read_json(settings)
    name = content.get("eos_token") if isinstance(content, dict) else None
    name = name.get("content") if isinstance(name, dict) else name
    if name is not None and not isinstance(name, str):
        raise ValueError(f"has an eos_token in its {settings.name} that is no text")
    return name


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer as in GPT-J and the original: eos = pad = 50256, ``<|image|>`` = 50257.

    Built from the merges only: the vocabulary is the 256 byte symbols, the results of the merges, and end-of-text.
    """
    merges = packaged_merges("gpt2")
    symbols = [*byte_symbols(), *(left + right for left, right in merges), EOS]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return Tokenizer(_byte_level(models.BPE(vocab=vocab, merges=merges)))


def packaged_merges(name: str) -> list[tuple[str, str]]:
    """Pairs of symbols that the BPE of ``gpt2`` or ``clip`` merges, in order."""
    lines = (Path(__file__).parent / name / "merges.txt").read_text(encoding="utf-8").splitlines()
    return [(left, right) for left, right in (line.split(" ") for line in lines[1:])]  # the first is "#version: 0.2"


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Trains a byte-level BPE tokenizer with GPT-2's word splitting.

    The result depends only on ``texts``, not on their order or the machine. End-of-text and ``<|image|>`` are the last
    two ids; ``vocab_size`` includes them and equals ``len``, unless ``texts`` have fewer pairs to merge. With
    ``progress``, bars on standard error.

    Raises:
        ValueError: ``vocab_size`` below 258, the bytes and the two tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size {vocab_size} is below 258: 256 bytes, end-of-text and image token")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=byte_symbols(), show_progress=progress)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_symbols() -> list[str]:
    """Printable symbol of each byte, in GPT-2's order: printable Latin-1, then the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@functools.cache
def _symbol_bytes() -> dict[str, int]:
    """Byte of each symbol."""
    symbols = byte_symbols()
    printable = [ord(symbol) for symbol in symbols if ord(symbol) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(symbols, [*printable, *others], strict=True))


def _rebuild(serialized: str, eos: str, image: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(serialized), eos, image)


def _without_padding(serialized: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _clean_up(text: str) -> str:
    marks, quote, contractions = _CLEAN_UP
    for mark in marks:
        text = text.replace(mark, mark[1:])
    text = text.replace(quote, "'")
    for contraction in contractions:
        text = text.replace(contraction, contraction[1:])
    return text
