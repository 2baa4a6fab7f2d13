"""A prompt before the model: what stands at every position of its sequence, and the pixels of its images."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.models.magma import MagmaConfig
from magma_jax.typing import Int

Prompt: TypeAlias = Sequence[str | ImageInput]

# A position of a prompt that is a word and no part of an image.
WORD = -1

# The key of this process's hashes: without it nobody can look for two images of one hash.
_KEY = secrets.token_bytes(32)


class Encoded(NamedTuple):
    """A prompt of S positions.

    Attributes:
        tokens: (S,) ids; 0 where an image stands.
        places: (S,) position within its image, or ``WORD``.
        owners: keyed hash of the image at every position, 128 bits, None for words.
        pixels: the images at the encoder's size, by hash; an image that occurs twice is there once.
        identity: (S, 3) rows that are equal where two prompts have the same thing at a position: the token's id and
            zeros, or -1 less the place and the two halves of the image's hash.
        salt: prompts of another share nothing with this one, neither positions nor images.
    """

    tokens: Int[np.ndarray, " S"]
    places: Int[np.ndarray, " S"]
    owners: list[bytes | None]
    pixels: dict[bytes, np.ndarray]
    identity: Int[np.ndarray, "S 3"]
    salt: bytes = b""

    @property
    def images(self) -> list[int]:
        """Where each image begins, in the order of the prompt."""
        return np.flatnonzero(self.places == 0).tolist()


def encode_prompt(
    prompt: Prompt, config: MagmaConfig, tokenizer: Tokenizer, *, max_images: int | None = None, salt: bytes = b""
) -> Encoded:
    """Tokens and pixels of a prompt.

    Raises:
        ValueError: an empty prompt, an item that is neither text nor image, too many images. ImageError.
    """
    size, per_image = config.encoder.image_size, image_positions(config)
    tokens: list[int] = []
    places: list[int] = []
    owners: list[bytes | None] = []
    identity: list[tuple[int, int, int]] = []
    key_of_hash = hashlib.blake2b(salt, key=_KEY, digest_size=32).digest()
    pixels: dict[bytes, np.ndarray] = {}
    for item in check_prompt(prompt):
        if isinstance(item, ImageInput):
            array = item.pixels(size)
            key = hashlib.blake2b(array.tobytes(), key=key_of_hash, digest_size=16).digest()
            pixels[key] = array
            tokens += [0] * per_image
            places += range(per_image)
            owners += [key] * per_image
            halves = np.frombuffer(key, np.int64).tolist()
            identity += [(-1 - place, *halves) for place in range(per_image)]
        else:
            ids = tokenizer.encode(item)
            tokens += ids
            places += [WORD] * len(ids)
            owners += [None] * len(ids)
            identity += [(token, 0, 0) for token in ids]
    if not tokens:
        raise ValueError("the prompt is empty: give at least one image or one word")
    if max_images is not None and len(pixels) > max_images:
        raise ValueError(f"the prompt has {len(pixels)} images, at most {max_images} are taken")
    as_array = (np.array(tokens, np.int32), np.array(places, np.int32))
    return Encoded(*as_array, owners, pixels, np.array(identity, np.int64), salt)


def encode_tokens(tokens: Sequence[int], config: MagmaConfig, salt: bytes = b"") -> Encoded:
    """A prompt of tokens alone.

    Raises:
        ValueError: none, or one that the vocabulary lacks.
    """
    ids = np.array(tokens, np.int64)
    if not len(ids):
        raise ValueError("the prompt is empty: give at least one token")
    if wrong := [token for token in tokens if not 0 <= token < config.lm.vocab_rows]:
        raise ValueError(f"the prompt has token {wrong[0]}, the vocabulary has {config.lm.vocab_rows}")
    identity = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=1)
    return Encoded(ids.astype(np.int32), np.full(len(ids), WORD, np.int32), [None] * len(ids), {}, identity, salt)


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


def image_positions(config: MagmaConfig) -> int:
    """Positions that one image takes in a sequence."""
    return config.encoder.positions or config.prefix.image_positions
