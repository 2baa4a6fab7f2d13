"""A prompt before the model: what stands at every position of its sequence, and the pixels of its images."""

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

# What an image is known by: its row in a source of images (int), or a keyed hash of its pixels (bytes).
ImageKey: TypeAlias = Any

# A position of a prompt that is a word and no part of an image.
WORD = -1

# The key of this process's hashes: without it nobody can look for two images of one hash.
HASH_KEY = secrets.token_bytes(32)


class ImageGrid(NamedTuple):
    """What the positions of an image stand for.

    Attributes:
        rows: of the grid, top to bottom.
        columns: left to right; positions go row by row.
        note: what else is in a position, empty if nothing.
    """

    rows: int
    columns: int
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a model takes images.

    Attributes:
        size: pixels of a side.
        positions: that one image takes in a sequence.
        grid: of the positions, over the square that the encoder sees; None where they are no places.
    """

    size: int
    positions: int
    grid: ImageGrid | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptLayout:
    """A prompt of S positions.

    Attributes:
        tokens: (S,) ids; 0 where an image stands.
        places: (S,) number of the image in the prompt times ``positions`` plus the position in it, or ``WORD``.
        images: what each image of the prompt is known by, in order.
        positions: that one image takes.
        pixels: images at the encoder's size, where they are known by their hash; one that occurs twice is there once.
        salt: prompts of another share nothing with this one, neither positions nor images.
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
        """Where each image begins, in the order of the prompt."""
        is_start = (self.places != WORD) & (self.places % self.positions == 0)
        return np.flatnonzero(is_start).tolist()

    @functools.cached_property
    def identity(self) -> Int[np.ndarray, "S 3"]:
        """Rows that are equal where two prompts have the same thing at a position.

        Of a word the token's id and zeros, of an image -1 less the position in it and the two halves of its hash.
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
        """Places from position ``start`` on, with the row of an image in a table instead of its number.

        ``row_of`` is asked for the images that stand there, in order.
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
    """Embedded prompts of different lengths, padded on the right."""

    embeddings: Float[Array, "B S D"]
    lengths: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None = None  # tokens that the prompts have, for a repetition penalty

    def repeat(self, n: int) -> "PromptBatch":
        """Every prompt ``n`` times, one after another: ``n`` samples of each with one call of ``generate``."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), self)


def lay_out(
    items: Sequence[str | ImageKey],
    tokenizer: Tokenizer,
    positions: int,
    *,
    pixels: Mapping[bytes, np.ndarray] | None = None,
    salt: bytes = b"",
) -> PromptLayout:
    """The layout of texts and images; each text is encoded for itself.

    Args:
        items: texts, and what images are known by.
        tokenizer: of the texts.
        positions: that one image takes.
        pixels: of the images, where they are known by their hash.
        salt: see ``PromptLayout``.
    """
    tokens: list[int] = []
    places: list[int] = []
    images: list[ImageKey] = []
    for item in items:
        if isinstance(item, str):
            ids = tokenizer.encode(item)
            tokens += ids
            places += [WORD] * len(ids)
        else:
            tokens += [0] * positions
            places += range(len(images) * positions, (len(images) + 1) * positions)
            images.append(item)
    return PromptLayout(
        tokens=np.array(tokens, np.int32),
        places=np.array(places, np.int32),
        images=tuple(images),
        positions=positions,
        pixels=pixels or {},
        salt=salt,
    )


def lay_out_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    *,
    max_images: int | None = None,
    salt: bytes = b"",
    name: str = "the prompt",
) -> PromptLayout:
    """The layout of a user's prompt, whose images are read and known by their hash.

    Raises:
        ValueError: an empty prompt, an item that is neither text nor image, too many images. ImageError.
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
    if not len(layout):
        raise ValueError(f"{name} is empty: give at least one image or one word")
    if max_images is not None and len(pixels) > max_images:
        raise ValueError(f"{name} has {len(pixels)} images, at most {max_images} are taken")
    return layout


def lay_out_tokens(tokens: Sequence[int], vocab_rows: int, salt: bytes = b"") -> PromptLayout:
    """The layout of tokens alone.

    Raises:
        ValueError: none, or one that the vocabulary lacks.
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
        ValueError: no list, or an item that is neither text nor image.
    """
    if isinstance(prompt, str | ImageInput):
        raise ValueError("a prompt is a list, such as [ImageInput('x.png'), 'Describe:']")
    for item in prompt:
        if not isinstance(item, str | ImageInput):
            raise ValueError(f"a prompt holds text and ImageInput, not {type(item).__name__}: {item!r:.80}")
    return list(prompt)
