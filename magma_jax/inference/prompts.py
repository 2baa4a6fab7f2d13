"""Prompt layouts: the token or image position at every position of a prompt, and the pixels of its images."""

import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.typing import Array, Bool, Float, Int

Prompt: TypeAlias = Sequence[str | ImageInput]


class ChatText(str):
    """Text of a chat template, which writes special tokens by name; all texts of such a prompt are ``ChatText``."""

    __slots__ = ()


# Identifier of an image: its row in a source of images (int), or a keyed hash of its pixels (bytes).
ImageKey: TypeAlias = Any

# Marks a position that holds a word instead of an image position.
WORD = -1

# Secret key of this process's hashes, so that nobody can construct two images with the same hash.
HASH_KEY = secrets.token_bytes(32)


class ImageGrid(NamedTuple):
    """Spatial grid of an image's positions, row by row.

    Attributes:
        rows: number of rows, top to bottom.
        columns: number of columns, left to right.
        note: other information that a position carries; empty if none.
    """

    rows: int
    columns: int
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Image input of a model.

    Attributes:
        size: pixels per side.
        positions: positions per image in a sequence.
        grid: grid of the positions over the encoder's input square; None if they are not spatial.
    """

    size: int
    positions: int
    grid: ImageGrid | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptLayout:
    """A prompt of S positions.

    Attributes:
        tokens: (S,) ids; 0 at image positions.
        places: (S,) index of the image in the prompt times ``positions`` plus the position within it, or ``WORD``.
        images: identifier of each image of the prompt, in order.
        positions: positions per image.
        pixels: pixels at the encoder's size by hash, for images identified by hash; duplicates are stored once.
        salt: prompts with different salts share neither cached positions nor images.
    """

    tokens: Int[np.ndarray, " S"]
    places: Int[np.ndarray, " S"]
    images: tuple[ImageKey, ...] = ()
    positions: int = 1
    pixels: Mapping[bytes, np.ndarray] = dataclasses.field(default_factory=dict)
    salt: bytes = b""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def image_starts(self) -> list[int]:
        """First position of each image, in order."""
        is_start = (self.places != WORD) & (self.places % self.positions == 0)
        return np.flatnonzero(is_start).tolist()

    @functools.cached_property
    def identity(self) -> Int[np.ndarray, "S 3"]:
        """One row per position; rows of two prompts are equal where their positions hold the same content.

        A word gives its token id and zeros; an image position p gives -1 - p and the two halves of the image's hash.
        """
        rows = np.zeros((len(self), 3), np.int64)
        rows[:, 0] = self.tokens
        seen = self.places != WORD
        if self.images:
            number, place = np.divmod(self.places[seen], self.positions)
            rows[seen, 0] = -1 - place
            rows[seen, 1:] = np.frombuffer(b"".join(self.images), np.int64).reshape(-1, 2)[number]
        return rows

    def table_places(self, row_of: Callable[[ImageKey], int], start: int = 0) -> Int[np.ndarray, " N"]:
        """Places from position ``start`` on, with an image's row in a table instead of its index.

        ``row_of`` is called for the images that occur there, in order.
        """
        places = self.places[start:].copy()
        seen = places != WORD
        number, place = np.divmod(places[seen], self.positions)
        rows = np.zeros(len(self.images), np.int32)
        for one in np.unique(number):
            rows[one] = row_of(self.images[one])
        places[seen] = rows[number] * self.positions + place
        return places


class PromptBatch(NamedTuple):
    """Embedded prompts of different lengths, right-padded."""

    embeddings: Float[Array, "B S D"]
    lengths: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None = None  # tokens of the prompts, for a repetition penalty

    def repeat(self, n: int) -> "PromptBatch":
        """Every prompt repeated ``n`` times in a row, for ``n`` samples of each with one call of ``generate``."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), self)


def lay_out(
    items: Sequence[str | ImageKey],
    tokenizer: Tokenizer,
    positions: int,
    *,
    pixels: Mapping[bytes, np.ndarray] | None = None,
    salt: bytes = b"",
) -> PromptLayout:
    """The layout of texts and images; each text is tokenized separately.

    A sequence begins with the tokenizer's begin of text, if it has one. A chat (``ChatText``) is tokenized as a whole,
    with images as special tokens, and begins as its template says.

    Args:
        items: texts and image identifiers.
        tokenizer: tokenizer of the texts.
        positions: positions per image.
        pixels: pixels of images that are identified by hash.
        salt: see ``PromptLayout``.
    """
    is_chat = any(isinstance(item, ChatText) for item in items)
    images = [item for item in items if not isinstance(item, str)]
    tokens: list[int] = []
    places: list[int] = []
    for number, ids in enumerate((_chat_stretches if is_chat else _stretches)(items, tokenizer)):
        tokens += ids
        places += [WORD] * len(ids)
        if number < len(images):
            tokens += [0] * positions
            places += range(number * positions, (number + 1) * positions)
    return PromptLayout(
        tokens=np.array(tokens, np.int32),
        places=np.array(places, np.int32),
        images=tuple(images),
        positions=positions,
        pixels=pixels or {},
        salt=salt,
    )


def _stretches(items: Sequence[str | ImageKey], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids before each image, and those behind the last one."""
    stretches: list[list[int]] = [[] if tokenizer.begin_id is None else [tokenizer.begin_id]]
    first = True
    for item in items:
        if not isinstance(item, str):
            stretches.append([])
        elif item:
            stretches[-1] += tokenizer.encode(item, first=first)
            first = False
    return stretches


def _chat_stretches(items: Sequence[str | ImageKey], tokenizer: Tokenizer) -> list[list[int]]:
    stretches: list[list[int]] = [[]]
    for token in tokenizer.encode_chat("".join(item if isinstance(item, str) else tokenizer.image for item in items)):
        if token == tokenizer.image_id:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return stretches


def lay_out_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    *,
    max_images: int | None = None,
    salt: bytes = b"",
    name: str = "the prompt",
) -> PromptLayout:
    """The layout of a user's prompt; its images are read and identified by hash.

    Raises:
        ValueError: an empty prompt, an item that is neither text nor image, too many images. ImageError: a bad image.
    """
    hash_key = hashlib.blake2b(salt, key=HASH_KEY, digest_size=32).digest()
    pixels: dict[bytes, np.ndarray] = {}
    items: list[str | ImageKey] = []
    for item in check_prompt(prompt):
        if isinstance(item, ImageInput):
            array = item.pixels(spec.size)
            key = hashlib.blake2b(array.tobytes(), key=hash_key, digest_size=16).digest()
            pixels[key] = array
            items.append(key)
        else:
            items.append(item)
    layout = lay_out(items, tokenizer, spec.positions, pixels=pixels, salt=salt)
    if not len(layout) or all(item == "" for item in items):
        raise ValueError(f"{name} is empty: give at least one image or one word")
    if max_images is not None and len(pixels) > max_images:
        raise ValueError(f"{name} has {len(pixels)} images, at most {max_images} are taken")
    return layout


def lay_out_tokens(tokens: Sequence[int], vocab_rows: int, salt: bytes = b"") -> PromptLayout:
    """The layout of a text-only prompt, given as tokens.

    Raises:
        ValueError: no tokens, or one outside the vocabulary.
    """
    if not len(tokens):
        raise ValueError("the prompt is empty: give at least one token")
    if wrong := [token for token in tokens if not 0 <= token < vocab_rows]:
        raise ValueError(f"the prompt has token {wrong[0]}, the vocabulary has {vocab_rows}")
    return PromptLayout(tokens=np.array(tokens, np.int32), places=np.full(len(tokens), WORD, np.int32), salt=salt)


def pad_layouts(layouts: Sequence[PromptLayout], length: int) -> dict[str, np.ndarray]:
    """``tokens`` and ``places`` (B, length), and ``lengths`` (B,)."""
    tokens = np.zeros((len(layouts), length), np.int32)
    places = np.full((len(layouts), length), WORD, np.int32)
    for row, layout in enumerate(layouts):
        tokens[row, : len(layout)] = layout.tokens
        places[row, : len(layout)] = layout.places
    return {"tokens": tokens, "places": places, "lengths": np.array([len(layout) for layout in layouts], np.int32)}


def check_prompt(prompt: Prompt) -> list[str | ImageInput]:
    """The items of a prompt.

    Raises:
        ValueError: not a list, or an item that is neither text nor image.
    """
    if isinstance(prompt, str | ImageInput):
        raise ValueError("a prompt is a list, such as [ImageInput('x.png'), 'Describe:']")
    for item in prompt:
        if not isinstance(item, str | ImageInput):
            raise ValueError(f"a prompt holds text and ImageInput, not {type(item).__name__}: {item!r:.80}")
    return list(prompt)
