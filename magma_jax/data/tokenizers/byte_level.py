"""BPE tokenizers: GPT-2's, from packaged merges, newly trained ones, and those of published language models.

Tokens are bytes (GPT-2, Llama 3, Qwen), or pieces of text with a token for each byte beside them (Gemma, Llama 2).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from magma_jax.data.tokenizers.settings import TokenizerSettings, read_fields, read_settings
from magma_jax.data.tokenizers.spaces import take_out_space
from magma_jax.foreign import ForeignError, read_json, read_text, shown

EOS = "<|endoftext|>"
IMAGE = "<|image|>"
# End-of-text tokens of published vocabularies, for files without a ``tokenizer_config.json``.
_EOS_NAMES = (EOS, "<|end_of_text|>", "<eos>", "</s>")
# A byte-level tokenizer in older folders without ``tokenizer.json``, such as OPT's.
_VOCABULARY_FILE, _MERGES_FILE = "vocab.json", "merges.txt"
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
        eos, image: text of the end-of-text token and of the image placeholder.
        begin, begin_id: token that a published tokenizer puts before every sequence, and its id; None for none.
        end_ids: ids that end an answer: ``eos_id``, which ends texts in training, then those of ``settings``.
        settings: names of special tokens, ends of text and the chat template.
        longest: bytes of the longest token: a text of N bytes has at least N / ``longest`` tokens.
        special_ids: ids that ``decode`` skips: these two, and the other special tokens of the vocabulary.

    Raises:
        ValueError: the vocabulary has no ``eos`` token, puts several tokens around a text, or has a usual word for an
            end of text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos: str = EOS,
        image: str = IMAGE,
        settings: TokenizerSettings = TokenizerSettings(),
    ):
        if backend.token_to_id(eos) is None:
            raise ValueError(f"the vocabulary has no end-of-text token {eos!r}; name its own with eos=...")
        self._arguments, self.settings = (eos, image, settings), settings
        # Copies, because parsing of special tokens is a property of the object, not an argument.
        self._published = _without_padding(backend.to_str())
        self._published.add_special_tokens([eos, image])
        self._parsing = _without_padding(self._published.to_str())
        self._space_before = take_out_space(self._parsing)
        self._plain = _without_padding(self._parsing.to_str())
        self._plain.encode_special_tokens = True
        self.eos, self.image = eos, image
        self.begin = _begin(self._published)
        self.begin_id: int | None = None if self.begin is None else self._published.token_to_id(self.begin)
        vocabulary = self._parsing.get_vocab(with_added_tokens=True)
        self.eos_id: int = vocabulary[eos]
        self.pad_id: int = self.eos_id
        self.image_id: int = vocabulary[image]
        added = self._parsing.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *settings.ends)))
        for token in self.end_ids:
            word = self._parsing.id_to_token(token)
            if word is not None and token not in self.special_ids:
                raise ValueError(
                    f"has the usual word {shown(word, 40)} at id {token}, which is named as an end of text; it belongs "
                    "to another model"
                )
        self._rows = max(vocabulary.values()) + 1
        # A published vocabulary may have words behind its own <|image|>.
        self._text_rows = max(token for word, token in vocabulary.items() if word != image) + 1
        self._of_bytes = isinstance(backend.decoder, decoders.ByteLevel)
        # Each character of a byte-level token represents one byte.
        self.longest: int = max(len(symbols) if self._of_bytes else len(symbols.encode()) for symbols in vocabulary)

    def __reduce__(self):
        # The backend's pickling loses the property that special tokens in text are not parsed.
        return _rebuild, (self.to_json(), *self._arguments)

    def __len__(self) -> int:
        """Number of ids, ``<|image|>`` included: the rows of an embedding table."""
        return self._rows

    @property
    def vocab_size(self) -> int:
        """Rows that the ids of texts need, without ``<|image|>`` (50257 for GPT-2, as the original counts)."""
        return self._text_rows

    def encode(self, text: str, parse_special: bool = False, *, first: bool = False) -> list[int]:
        """Ids of ``text``, without added tokens.

        By default the spelling of a special token is plain text, so that a caption cannot contain an end or an image
        token. With ``parse_special`` it becomes the token, as in the original. ``first`` marks the first text of a
        sequence, before which some vocabularies put a space.
        """
        backend = self._parsing if parse_special else self._plain
        if first and text and (self._space_before == "always" or (self._space_before and text[0] not in " " + _SPACE)):
            text = f" {text}"
        return backend.encode(text, add_special_tokens=False).ids

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a chat in which a template has written the special tokens, as the published tokenizer gives them."""
        return self._published.encode(text, add_special_tokens=False).ids

    def spell_out(self, text: str) -> str:
        """``text`` with a zero-width space in every spelling of a special token, so that ``encode_chat`` finds none."""
        return self._specials.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)

    @functools.cached_property
    def _specials(self) -> re.Pattern[str]:
        names = sorted(filter(None, map(self._published.id_to_token, self.special_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

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
        return self._published.to_str()

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes ``folder/tokenizer.json`` (the ``tokenizers`` format) and returns its path.

        Names of special tokens, the chat template and several ends of text are in a ``tokenizer_config.json``, a
        ``chat_template.jinja`` and a ``generation_config.json`` beside it, if there are any, as is an end of text other
        than GPT-2's.
        """
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        self.settings_to_save.write(path.parent)
        return path

    @property
    def settings_to_save(self) -> TokenizerSettings:
        """``settings`` that name the end of text too, unless it is GPT-2's, and all ends if there are several."""
        names = {**self.settings.special, **({} if self.eos == EOS else {"eos_token": self.eos})}
        ends = self.end_ids if len(self.end_ids) > 1 else ()
        return dataclasses.replace(self.settings, names=tuple(names.items()), ends=ends)

    @classmethod
    def from_json(
        cls,
        text: str,
        eos: str | None = None,
        image: str = IMAGE,
        settings: TokenizerSettings = TokenizerSettings(),
    ) -> "Tokenizer":
        """Inverse of ``to_json``; by default the end of text is that of ``settings``, or the first of the usual ones.

        Raises:
            ValueError: not in the ``tokenizers`` format, or no ``eos`` in it.
        """
        return _from_json(text, eos or settings.special.get("eos_token"), image, settings)

    @classmethod
    def load(cls, path: str | os.PathLike, eos: str | None = None, image: str = IMAGE) -> "Tokenizer":
        """Reads a ``tokenizer.json``, or the one in a folder, with the settings beside it, see ``TokenizerSettings``.

        A folder may hold a byte-level ``vocab.json`` and ``merges.txt`` instead. By default the end of text is that of
        the settings, or as ``from_json`` finds it.

        Raises:
            ValueError: not such a file, or no ``eos`` in it. OSError: no such file.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        folder = path.parent
        try:
            settings = read_settings(folder)
            parts = not path.exists() and path.name == "tokenizer.json" and (folder / _MERGES_FILE).is_file()
            text = _from_parts(folder, settings.special) if parts else read_text(path)
            return cls.from_json(text, eos, image, settings)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} {error}") from None


# GPT-2's takes half a second to parse, and a process may open many folders with it.
@functools.lru_cache(maxsize=4)
def _from_json(text: str, eos: str | None, image: str, settings: TokenizerSettings) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the binding raises plain Exception
        raise ValueError(f"is not a tokenizer.json: {error}") from None
    if eos is None:
        eos = next((name for name in _EOS_NAMES if backend.token_to_id(name) is not None), EOS)
    return Tokenizer(backend, eos, image, settings)


def _from_parts(folder: Path, special: dict[str, str]) -> str:
    """The tokenizer of ``vocab.json`` and ``merges.txt`` as JSON text; its settings say whether a text has a begin.

    Raises:
        ValueError: files of another kind, or that do not fit each other.
    """
    vocabulary = read_json(folder / _VOCABULARY_FILE)
    lines = read_text(folder / _MERGES_FILE).splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or any(len(pair) != 2 for pair in merges):
        raise ForeignError(f"has a {_VOCABULARY_FILE} or {_MERGES_FILE} that is none of a byte-level tokenizer")
    try:
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in merges]))
    except Exception as error:  # the binding raises plain Exception
        raise ForeignError(f"has a {_VOCABULARY_FILE} and {_MERGES_FILE} that do not fit ({error})") from None
    backend.add_special_tokens([name for name in dict.fromkeys(special.values()) if name in vocabulary])
    begin = special.get("bos_token")
    if read_fields(folder).get("add_bos_token") is True and begin is not None:
        if begin not in vocabulary:
            raise ForeignError(f"has no word {begin!r} in its {_VOCABULARY_FILE}, which goes before every text")
        pair = (begin, vocabulary[begin])
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[pair])
    return backend.to_str()


def _begin(backend: tokenizers.Tokenizer) -> str | None:
    """The token that a tokenizer puts before every text. Raises ValueError if it puts other tokens around it."""
    plain, added = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    first = added[: len(added) - len(plain)]
    if added != first + plain or len(first) > 1:
        shown = [backend.id_to_token(token) for token in added]
        raise ValueError(f"puts more around a text than one token before it, which is not offered: 'a' is {shown}")
    return backend.id_to_token(first[0]) if first else None


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


def _rebuild(serialized: str, eos: str, image: str, settings: TokenizerSettings) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(serialized), eos, image, settings)


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
