"""Prompts of MAGVLT: texts to tokens, images to codes, masks of pixels to places of codes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from magma_jax.data.images import ImageInput, to_square
from magma_jax.data.tokenizers.text import TextTokenizer, TooLong, encode_padded
from magma_jax.inference.prompts import Prompt, check_prompt
from magma_jax.typing import Bool, Int


class Parts(NamedTuple):
    """The image of a prompt and its text, each None if it has none."""

    image: ImageInput | None
    text: str | None


def parts_of(prompt: Prompt) -> Parts:
    """The parts of a prompt: a text, an image, or an image and a text.

    Raises:
        ValueError: an empty prompt, several images or texts, or a text before the image.
    """
    items = check_prompt(prompt)
    images = [item for item in items if isinstance(item, ImageInput)]
    texts = [item for item in items if isinstance(item, str)]
    if not items or len(images) > 1 or len(texts) > 1 or (images and not isinstance(items[0], ImageInput)):
        raise ValueError(
            f"the prompt has {len(images)} images and {len(texts)} texts; this model takes a text, an image, or both, "
            "the image first"
        )
    return Parts(images[0] if images else None, texts[0] if texts else None)


def encode_texts(
    texts: Sequence[str], tokenizer: TextTokenizer, positions: int, too_long: TooLong
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Tokens of texts and their lengths, end token included.

    Raises:
        ValueError: an empty text, one without a character of the vocabulary, or with ``too_long`` "error" one of more
            than ``positions`` tokens.
    """
    for text in texts:
        if not text.strip():
            raise ValueError("the prompt is empty; say what the image shows")
    padded = [encode_padded(tokenizer, text, positions, too_long=too_long) for text in texts]
    for text, found in zip(texts, padded, strict=True):
        if found.ids[0] == tokenizer.pad_id:
            raise ValueError(f"{text!r:.80}: the vocabulary has none of its characters")
    return np.array([found.ids for found in padded], np.int32), np.array([found.length for found in padded], np.int32)


def places_of_mask(
    mask: Bool[np.ndarray, "H W"], image: Image.Image, size: int, grid: tuple[int, int]
) -> Bool[np.ndarray, " I"]:
    """Codes to draw anew: those of whose pixels the mask marks any, after the image's own resize and crop.

    Args:
        mask: True for the pixels to draw anew.
        image: the image that it belongs to.
        size: pixels per side of the model's images.
        grid: rows and columns of the model's codes.

    Raises:
        ValueError: a mask of another size than the image, or one that keeps everything.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape != (image.height, image.width):
        shape = " x ".join(map(str, mask.shape[::-1]))
        raise ValueError(f"the mask has {shape} pixels, but the image {image.width} x {image.height}")
    marked = Image.fromarray(mask.astype(bool).astype(np.uint8) * 255)
    pixels = np.asarray(to_square(marked.convert("RGB"), size))[..., 0] > 0
    rows, columns = grid
    places = pixels.reshape(rows, size // rows, columns, size // columns).any((1, 3)).reshape(-1)
    if not places.any():
        raise ValueError("the mask keeps everything, so there is nothing to draw; mark the pixels to draw anew")
    return places


def masked_words(
    text: str, tokenizer: TextTokenizer, positions: int
) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"], int]:
    """Tokens of a text, which of them stand for ``[MASK]``, and their number with the end token.

    Raises:
        ValueError: a text without ``[MASK]``, or of more than ``positions`` tokens.
    """
    pieces = text.split("[MASK]")
    if len(pieces) < 2:
        raise ValueError("the text has no [MASK], so there is nothing to fill in; put one for each token to draw")
    ids: list[int] = []
    masked: list[bool] = []
    for number, piece in enumerate(pieces):
        # The space before a word belongs to its token, or to none.
        found = tokenizer.encode(piece if number == len(pieces) - 1 else piece.removesuffix(" "))
        ids += ([0] if number else []) + found
        masked += ([True] if number else []) + [False] * len(found)
    if len(ids) > positions:
        raise ValueError(f"the text has {len(ids)} tokens, more than {positions}: {text[:60]!r}; shorten it")
    tokens, places = np.full(positions, tokenizer.pad_id, np.int32), np.zeros(positions, bool)
    tokens[: len(ids)], places[: len(ids)] = ids, masked
    return tokens, places, min(len(ids) + 1, positions)
