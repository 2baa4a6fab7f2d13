"""Encoders of texts and images: vectors whose inner products tell how well a document fits a query."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from magma_jax.retrieval.vectors import unit
from magma_jax.typing import Float, UInt8

# A word of a text, for the hashed encoder.
_WORD = re.compile(r"[\w'-]+")

# Weights of words in names of drawings, beside 1 for those that say what is drawn.
GENDER, TONE = 2.0, 0.25
# Brightest channel of a pixel of an outline, at most.
BLACK = 80
_GENDERS = frozenset(["man", "woman", "person", "men", "women", "people"])
_TONES = frozenset(["light", "medium-light", "medium", "medium-dark", "dark"])
_UNNAMED = frozenset(["a", "an", "the", "of", "and", "with", "skin", "tone"])


class Encoder(Protocol):
    """A frozen encoder; vectors are fp32 of norm 1, or zero where there is nothing to encode.

    Attributes:
        name: which encoder and which weights; a bank is searched by the encoder that made it.
        width: entries of a vector.
        image_size: pixels per side of its images.
    """

    name: str
    width: int
    image_size: int

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Vectors of texts."""
        ...

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        """Vectors of images."""
        ...


class HashedEncoder:
    """Words of a text and colours of an image, without any training; labelled so in reports.

    The first ``words`` entries count words by their hash, with a sign; the rest are the mean colours of an 8 x 8 grid.
    A text and an image have no entries in common, so a document, their mean, is found by either.

    Args:
        words: entries for words.
    """

    image_size = 64

    def __init__(self, words: int = 1024):
        self._words = words
        self._cells = 8
        self.width = words + self._cells**2 * 3
        self.name = f"hashed-{words}"

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        found = np.zeros((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            for word in _WORD.findall(text.lower()):
                self._count(found[row], word, 1.0)
        return unit(found)

    def _count(self, vector: Float[np.ndarray, " D"], word: str, weight: float) -> None:
        number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        vector[number % self._words] += weight if number & (1 << 63) else -weight

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        found = np.zeros((len(images), self.width), np.float32)
        step = images.shape[1] // self._cells
        cells = images.reshape(len(images), self._cells, step, self._cells, step, 3).mean((2, 4), dtype=np.float32)
        found[:, self._words :] = (cells / 127.5 - 1).reshape(len(images), -1)
        return unit(found)


class NamesEncoder(HashedEncoder):
    """OpenMoji's drawings: by name what is drawn counts most, then of which gender, and least in which skin tones.

    The words of a tone have ``TONE`` as their weight, each together with the word before it, so that the left and the
    right tone of two people differ; words that all names share have none. An image is found by its black outlines,
    which are the same in all tones: their share of every cell of a grid of 16 x 16.
    """

    def __init__(self, words: int = 4096):
        super().__init__(words)
        self._cells = 16
        self.width = words + self._cells**2
        self.name = f"names-{words}"

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        found = np.zeros((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            before = ""
            for word in _WORD.findall(text.lower()):
                if word in _TONES:
                    self._count(found[row], f"{before} {word}", TONE)
                elif word not in _UNNAMED:
                    self._count(found[row], word, GENDER if word in _GENDERS else 1.0)
                before = word
        return unit(found)

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        found = np.zeros((len(images), self.width), np.float32)
        step = images.shape[1] // self._cells
        dark = (images.max(-1) < BLACK).astype(np.float32)
        cells = dark.reshape(len(images), self._cells, step, self._cells, step).mean((2, 4))
        found[:, self._words :] = cells.reshape(len(images), -1)
        return unit(found)


def _clip(weights: str | None) -> Encoder:
    from magma_jax.retrieval.clip_encoder import ClipEncoder  # here: most encoders need no networks

    return ClipEncoder(_given(weights, "clip needs CLIP's weights: --weights ViT-B-32.pt"))


def _minilm(weights: str | None) -> Encoder:
    from magma_jax.retrieval.bi_encoder import BiEncoder

    return BiEncoder(_given(weights, "minilm needs its projection: --weights FILE of magma_jax.retrieval fit"))


def _given(weights: str | None, otherwise: str) -> str:
    if weights is None:
        raise ValueError(otherwise)
    return weights


# Encoders by name; each takes the path of its weights, or None.
ENCODERS: dict[str, Callable[[str | None], Encoder]] = {
    "hashed": lambda weights: HashedEncoder(),
    "names": lambda weights: NamesEncoder(),
    "clip": _clip,
    "minilm": _minilm,
}


def open_encoder(name: str, weights: str | None = None) -> Encoder:
    """The encoder of a name, with the file of its ``weights``.

    Raises:
        ValueError: no such encoder, or one without the weights that it needs. Reading these raises errors of its own.
    """
    if name not in ENCODERS:
        raise ValueError(f"no encoder {name!r}; there are {', '.join(ENCODERS)}")
    return ENCODERS[name](weights)


def document_vectors(
    texts: Float[np.ndarray, "N D"], images: Float[np.ndarray, "N D"] | None
) -> Float[np.ndarray, "N D"]:
    """Vectors of documents: the mean of text and image (section 2.1); of a text alone its own."""
    return texts if images is None else (texts + images) / 2
